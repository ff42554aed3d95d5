/** What the stack editor asks of ComfyUI's page, as far as there is any of it here: a graph that holds the base. */

export const app = { graph: { nodes: [], links: [], getNodeById: () => null }, canvas: null };
