/** Addresses as ComfyUI's page has them. */

export const api = {
  apiURL: (route) => route,
  fetchApi: (route, options) => fetch(route, options),
};
