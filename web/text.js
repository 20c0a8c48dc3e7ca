// What Bonsai Model Info and Save Bonsai Model say, on the node, in both ways to draw nodes. Saved with the workflow.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

app.registerExtension({
  name: "bonsai-image.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!["BonsaiModelInfo", "BonsaiSaveModel"].includes(nodeData.name)) return;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function () {
      onNodeCreated?.apply(this, arguments);
      const options = { multiline: true, placeholder: nodeData.name === "BonsaiModelInfo" ? "Run" : "" };
      const { widget } = ComfyWidgets.STRING(this, "text", ["STRING", options], app);
      widget.options.serialize = false; // not an input of the node
      widget.options.read_only = true;
      if (widget.inputEl) widget.inputEl.readOnly = true;
    };
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      const text = message.text?.join("\n") ?? "";
      app.canvas.emitBeforeChange(); // between these two, the frontend stores what changes
      this.widgets.find((widget) => widget.name === "text").value = text;
      const lines = text.split("\n").reduce((sum, line) => sum + Math.ceil(line.length / 60), 0);
      const [width, height] = this.computeSize();
      this.setSize([Math.max(this.size[0], width, 460), Math.max(this.size[1], height + 16 * lines)]);
      app.canvas.emitAfterChange();
    };
  },
});
