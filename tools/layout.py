"""Columns of nodes to the frontend's own format: a workflow, or a subgraph blueprint.

Sockets, widgets and outputs come from the node schemas; what is in the graphs is in ``workflows.py``.
"""

import uuid
from dataclasses import dataclass, field

#: Pixels on the canvas: height of a title bar, of a row of sockets, of a widget; space around nodes and groups, and
#: between the columns of a group.
_TITLE, _ROW, _WIDGET, _MARGIN, _GAP, _BESIDE = 30, 20, 28, 16, 18, 30
#: Version of the frontend whose format this is.
_FRONTEND = "1.47.10"
#: Pixels from a node's side to where a link turns that goes back to a node below or above.
_TURN = 12
#: The ids under which the nodes of a subgraph see what comes in and what goes out.
_INPUT, _OUTPUT = -10, -20
#: LiteGraph's mode of a node that passes its inputs on: switched off, Ctrl+B switches it on.
BYPASSED = 4


@dataclass
class Node:
    """One node. ``inputs`` maps a socket to (key of the source node, index of its output); ``above`` is empty space for
    links to pass through."""

    key: str
    type: str
    width: int
    widgets: list = field(default_factory=list)
    inputs: dict[str, tuple[str, int]] = field(default_factory=dict)
    title: str | None = None
    height: int | None = None
    models: list[dict[str, str]] = field(default_factory=list)
    mode: int = 0
    above: int = 0


@dataclass
class Group:
    """A titled frame; ``columns`` of nodes from left to right, each from top to bottom."""

    title: str
    columns: list[list[Node]]


@dataclass
class Column:
    """Groups below one another, beginning at ``top``: what leaves the loader at the top passes above them."""

    top: int
    groups: list[Group]


def sockets(schema: type | None) -> tuple[list[tuple[str, str, bool]], int]:
    """(name, type, is a widget) of every input of a node in the frontend's order, and how many widgets it has."""
    if schema is None:
        return [], 0
    types = schema.INPUT_TYPES()
    plain, widgets, count = [], [], 0
    for name, spec in (types["required"] | types.get("optional", {})).items():
        kind = "COMBO" if isinstance(spec[0], list) else spec[0]
        if kind in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
            widgets.append((name, kind, True))
            more = spec[1] if len(spec) > 1 else {}
            # The frontend adds the control to every seed, whatever the schema says.
            count += 1 + bool(more.get("control_after_generate", name == "seed"))
        else:
            plain.append((name, kind, False))
    return plain + widgets, count


def height(node: Node, schema: type | None) -> int:
    if node.height is not None:
        return node.height
    names, widgets = sockets(schema)
    rows = max(sum(not widget for *_, widget in names), len(schema.RETURN_TYPES))
    return rows * _ROW + widgets * _WIDGET + 14


def place(columns: list[Column], schemas: dict[str, type]) -> tuple[dict[str, tuple[int, int]], list[dict]]:
    """Position of every node by key, and the frames."""
    positions, frames, left = {}, [], 0
    for column in columns:
        top, right = column.top, left
        for group in column.groups:
            x, bottom = left + _MARGIN, top
            for nodes in group.columns:
                y = top + 40 + _TITLE
                for node in nodes:
                    y += node.above
                    positions[node.key] = (x, y)
                    y += height(node, schemas.get(node.type)) + _TITLE + _GAP
                bottom = max(bottom, y - _TITLE)
                x += max(node.width for node in nodes) + _BESIDE
            x -= _BESIDE - _MARGIN
            frames.append({"id": len(frames) + 1, "title": group.title, "bounding": [left, top, x - left, bottom - top],
                           "color": "#3f789e", "font_size": 24, "flags": {}})
            top, right = bottom + _GAP, max(right, x)
        left = right + _GAP
    return positions, frames


class Layout:
    """``columns`` with a place, a number and its links for every node."""

    def __init__(self, columns: list[Column], schemas: dict[str, type], version: str):
        """``version`` is that of the node pack."""
        self.nodes = [node for column in columns for group in column.groups for part in group.columns for node in part]
        self.positions, self.frames = place(columns, schemas)
        self.ids = {node.key: number for number, node in enumerate(self.nodes, 1)}
        self.schemas, self.version = schemas, version
        kinds = {node.key: schemas[node.type].RETURN_TYPES if node.type in schemas else () for node in self.nodes}
        #: (id, source, its output, target, its input, type) as the format has it.
        self.links: list[list] = []
        for node in self.nodes:
            for end, (key, output) in sorted((self.input_of(node.key, socket)[:2], start)
                                             for socket, start in node.inputs.items()):
                self.link((self.ids[key], output), end, kinds[key][output])

    def link(self, start: tuple[int, int], end: tuple[int, int], kind: str) -> int:
        """Connect (node id, output) with (node id, input); the id of the link."""
        self.links.append([len(self.links) + 1, *start, *end, kind])
        return len(self.links)

    def input_of(self, key: str, socket: str) -> tuple[int, int, str]:
        """Node id, index and type of an input."""
        node = next(node for node in self.nodes if node.key == key)
        names = sockets(self.schemas[node.type])[0]
        index = [name for name, *_ in names].index(socket)
        return self.ids[key], index, names[index][1]

    def turns(self) -> tuple[list[dict], list[dict]]:
        """The reroutes of the links that go back to the left, to a node below or above: around both nodes, through the
        space between them; and which link ends at which reroute. Other nodes would hide such a link."""
        reroutes, ends = [], []
        for link, source, _, target, *_ in self.links:
            (x, y), (left, top) = (self.positions[self.nodes[number - 1].key] for number in (source, target))
            node, right = self.nodes[target - 1], x + self.nodes[source - 1].width
            if left < right:
                between = top - _TITLE if top > y else top + height(node, self.schemas[node.type]) + _GAP
                for turn in (right + _TURN, left - _TURN):
                    reroutes.append({"id": len(reroutes) + 1, "pos": [turn, between - _GAP // 2], "linkIds": [link],
                                     **({"parentId": len(reroutes)} if turn < right else {})})
                ends.append({"id": link, "parentId": len(reroutes)})
        return reroutes, ends

    def written(self) -> list[dict]:
        """The nodes in the frontend's format."""
        return [_written(node, self.ids[node.key], self.positions[node.key], self.links, self.schemas.get(node.type),
                         self.version) for node in self.nodes]


def workflow(name: str, columns: list[Column], schemas: dict[str, type], version: str) -> dict:
    """The workflow ``name``, as the frontend saves one."""
    layout = Layout(columns, schemas, version)
    reroutes, ends = layout.turns()
    return {
        "id": _uuid(name), "revision": 0, "last_node_id": len(layout.nodes), "last_link_id": len(layout.links),
        "nodes": layout.written(), "links": layout.links, "groups": layout.frames, "config": {},
        "extra": {"ds": {"scale": 0.75, "offset": [90, 150]}, "frontendVersion": _FRONTEND,
                  "workflowRendererVersion": "LG", "reroutes": reroutes, "linkExtensions": ends},
        "version": 0.4,
    }


def blueprint(name: str, description: str, columns: list[Column], inputs: dict[str, tuple[str, str]],
              output: tuple[str, int], schemas: dict[str, type], version: str) -> dict:
    """A subgraph as one node ``name``. ``inputs`` maps its widgets to (node key, widget), ``output`` is (node key,
    index of the output)."""
    layout = Layout(columns, schemas, version)
    last = len(layout.nodes)
    entries, outer, widgets = [], [], []
    for slot, (label, (key, widget)) in enumerate(inputs.items()):
        *end, kind = layout.input_of(key, widget)
        inner = layout.nodes[end[0] - 1]
        entries.append({"id": _uuid(f"{name}/{label}"), "name": label, "type": kind,
                        "linkIds": [layout.link((_INPUT, slot), tuple(end), kind)], "pos": [-120, 20 + slot * _ROW]})
        outer.append({"name": label, "type": kind, "widget": {"name": label}, "link": None})
        widgets.append([str(end[0]), widget])
        if "randomize" in inner.widgets:
            widgets.append([str(end[0]), "control_after_generate"])
    key, index = output
    kind = schemas[next(node.type for node in layout.nodes if node.key == key)].RETURN_TYPES[index]
    right = max(frame["bounding"][0] + frame["bounding"][2] for frame in layout.frames)
    result = {"id": _uuid(f"{name}/{kind}"), "name": kind, "type": kind, "pos": [right + 100, 20],
              "linkIds": [layout.link((layout.ids[key], index), (_OUTPUT, 0), kind)]}
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inside = {
        "id": _uuid(name), "version": 1, "revision": 0, "config": {}, "name": name, "description": description,
        "state": {"lastGroupId": len(layout.frames), "lastNodeId": last + 1, "lastLinkId": len(layout.links),
                  "lastRerouteId": 0},
        "inputNode": {"id": _INPUT, "bounding": [-240, 0, 140, 40 + len(entries) * _ROW]},
        "outputNode": {"id": _OUTPUT, "bounding": [right + 80, 0, 120, 60]},
        "inputs": entries, "outputs": [result], "widgets": [], "nodes": layout.written(), "groups": layout.frames,
        "links": [dict(zip(names, link, strict=True)) for link in layout.links],
        "extra": {"workflowRendererVersion": "LG"},
    }
    node = {
        "id": last + 1, "type": inside["id"], "pos": [0, 0], "size": [400, 400], "flags": {}, "order": 0, "mode": 0,
        "inputs": outer, "outputs": [{"name": kind, "type": kind, "links": []}], "title": name,
        "properties": {"proxyWidgets": widgets}, "widgets_values": [],
    }
    return {"revision": 0, "last_node_id": last + 1, "last_link_id": 0, "nodes": [node], "links": [], "version": 0.4,
            "definitions": {"subgraphs": [inside]},
            "extra": {"BlueprintDescription": description, "workflowRendererVersion": "LG"}}


def _uuid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"bonsai-image/{name}"))


def _written(node: Node, number: int, position: tuple[int, int], links: list[list], schema: type | None,
             version: str) -> dict:
    arriving = {slot: link for link, _, _, target, slot, _ in links if target == number}
    inputs = []
    for slot, (name, kind, widget) in enumerate(sockets(schema)[0]):
        inputs.append({"name": name, "type": kind, **({"widget": {"name": name}} if widget else {}),
                       "link": arriving.get(slot)})
    names = () if schema is None else getattr(schema, "RETURN_NAMES", None) or schema.RETURN_TYPES
    outputs = [{"name": name, "type": kind, "links": [link[0] for link in links if link[1:3] == [number, slot]]}
               for slot, (name, kind) in enumerate(zip(names, schema.RETURN_TYPES if schema else (), strict=True))]
    owner = {"cnr_id": "bonsai-image", "ver": version} if node.type.startswith("Bonsai") else {
        "cnr_id": "comfy-core", "ver": "0.29.0"}
    properties = {} if schema is None else {**owner, "Node name for S&R": node.type}
    return {
        "id": number, "type": node.type, "pos": list(position), "size": [node.width, height(node, schema)], "flags": {},
        "order": number - 1, "mode": node.mode, "inputs": inputs, "outputs": outputs,
        **({"title": node.title} if node.title else {}),
        "properties": {**properties, **({"models": node.models} if node.models else {})},
        "widgets_values": node.widgets,
        **({"color": "#432", "bgcolor": "#653"} if schema is None else {}),
    }
