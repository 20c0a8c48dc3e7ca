// What Bonsai Model Info and Save Bonsai Model say, on the node, in both ways to draw nodes. Saved with the workflow.
// The node is as large as that from the beginning: one that grew after a run would cover its neighbours.
// And what this pack raises, in whole and without a click: the frontend's own message is 'Check its inputs'.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const FOLDER = decodeURIComponent(import.meta.url.split("/").at(-2)); // of this pack, in custom_nodes

app.registerExtension({
  name: "bonsai-image.text",
  setup() {
    const { toast } = app.extensionManager;
    let shown = [];
    app.api.addEventListener("execution_start", () => {
      shown.forEach((message) => toast.remove(message));
      shown = [];
    });
    app.api.addEventListener("execution_error", ({ detail }) => {
      if (!detail.traceback.at(-1)?.split(/[\\/]/).includes(FOLDER)) return; // raised by others
      shown.push({ severity: "error", summary: "Bonsai Image", detail: detail.exception_message });
      toast.add(shown.at(-1));
    });
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!["BonsaiModelInfo", "BonsaiSaveModel"].includes(nodeData.name)) return;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      const info = nodeData.name === "BonsaiModelInfo";
      const options = { multiline: true, placeholder: info ? "Run" : "" };
      const { widget } = ComfyWidgets.STRING(this, "text", ["STRING", options], app);
      widget.options.serialize = false; // not an input of the node
      widget.options.read_only = true;
      if (widget.inputEl) widget.inputEl.readOnly = true;
      this.setSize([460, info ? 340 : 190]);
    };
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      app.canvas.emitBeforeChange(); // between these two, the frontend stores what changes
      this.widgets.find((widget) => widget.name === "text").value = message.text?.join("\n") ?? "";
      app.canvas.emitAfterChange();
    };
  },
});
