/** What the pack adds to ComfyUI's page: the stack's rows, a preview while sampling, a player that compares,
 * what a node has to say. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { COMPARE, prepareCompare, restoreClips, showClips } from "./compare.js";
import { styleSheet } from "./dom.js";
import { endPreviews, showPreview } from "./preview.js";
import { restoreSaid, showSaid } from "./said.js";
import { ask, forgetLists } from "./server.js";
import { refreshStacks, showStatus, stackWidget } from "./stack.js";
import { texts } from "./text.js";

const STACK = "CogLoomLoraStack";
const ROWS = "COGLOOM_ROWS";

let queued = 0;

app.registerExtension({
  name: "cogloom.nodes",

  getCustomWidgets() {
    return { [ROWS]: (node, name, input) => stackWidget(node, name, text(), input?.[1]?.default ?? "[]") };
  },

  /**
   * The rows stay a STRING: its socket, its place among the values and its JSON text are those of a text box, which is
   * what they are without this file. Only what is drawn for it changes.
   */
  beforeRegisterNodeDef(_type, definition) {
    if (definition.name !== STACK) return;
    const [kind, options = {}] = definition.input.required.rows;
    definition.input.required.rows = [kind, { ...options, widgetType: ROWS }];
  },

  nodeCreated(node) {
    if (node.comfyClass === COMPARE) prepareCompare(node);
  },

  setup() {
    styleSheet("cogloom.css");
    api.addEventListener("cogloom.preview", ({ detail }) => showPreview(detail, text()));
    api.addEventListener("executing", ({ detail }) => endPreviews(detail?.node ?? detail));
    api.addEventListener("executed", ({ detail }) => {
      showClips(detail.display_node ?? detail.node, detail.output, text());
      showSaid(detail.display_node ?? detail.node, detail.output, text());
    });
    for (const type of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(type, afterRun);
    }
    api.addEventListener("graphChanged", later);
    readStatus();
  },

  afterConfigureGraph() {
    later();
    // The front end gives the outputs back after the graph is there, without a word to extensions.
    setTimeout(() => {
      restoreClips(text());
      restoreSaid(text());
    }, 300);
  },

  refreshComboInNodes() {
    forgetLists();
    refreshStacks();
  },
});

function text() {
  return texts(app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? navigator.language);
}

function afterRun() {
  endPreviews();
  forgetLists();
  readStatus();
}

/** Links and bases may have changed; one look for many changes at once. */
function later() {
  clearTimeout(queued);
  queued = setTimeout(() => {
    refreshStacks();
    readStatus();
  }, 60);
}

async function readStatus() {
  try {
    showStatus(await ask("status"));
  } catch (error) {
    console.warn("cogloom: status:", error.message);
  }
}
