// Which picture a node is connected to, found in the graph before anything has run.

import {api} from "../../../scripts/api.js";
import {app} from "../../../scripts/app.js";

const BYPASSED = 4;
const MOST_STEPS = 64; // a circle of links ends here
const ARRIVED = "s2dm_picture"; // what the node sends of the picture that it was run with
const CHOSEN = "s2dm_picture"; // the node's property with a picture chosen by hand

/** Whether something is connected to an input of a node. */
export function isConnected(node, name) {
    return node.inputs?.find(input => input.name === name)?.link != null;
}

/**
 * The picture to show on a node: {address, exact}, null where none is known. It is exact if it is
 * what the node gets, and a guess if nodes between may change it, its size too.
 */
export function pictureOf(node, name) {
    if (isConnected(node, name)) {
        return known(node.graph, node.inputs.find(input => input.name === name).link);
    }
    const chosen = node.properties?.[CHOSEN];
    return typeof chosen === "string" ? {address: fileAddress(chosen), exact: true} : null;
}

/** The address of the picture that the node was last run with, null before. */
export function arrivedPicture(node) {
    const image = outputOf(node)?.[ARRIVED]?.[0];
    return image?.filename ? viewAddress(image.filename, image.type, image.subfolder) : null;
}

/** Put a picture among ComfyUI's input files and remember it on the node. */
export async function choosePicture(node, file) {
    const body = new FormData();
    body.append("image", file);
    const answer = await api.fetchApi("/upload/image", {method: "POST", body});
    if (answer.status !== 200) {
        throw new Error(`ComfyUI did not take the picture (${answer.status}).`);
    }
    const {name, subfolder} = await answer.json();
    node.properties[CHOSEN] = subfolder ? `${subfolder}/${name}` : name;
}

function linkOf(graph, id) {
    return graph?.getLink?.(id) ?? graph?.links?.get?.(id) ?? graph?.links?.[id] ?? null;
}

// Follow a link to the first node whose picture is known, through reroutes, bypassed nodes, the
// edges of subgraphs, and nodes that make one picture of another.
function known(graph, linkId) {
    let exact = true;
    for (let step = 0; step < MOST_STEPS && graph && linkId != null; step += 1) {
        const link = linkOf(graph, linkId);
        if (!link) return null;
        if (graph.inputNode && link.origin_id === graph.inputNode.id) {
            const outer = outerNode(graph);
            linkId = outer?.inputs[link.origin_slot]?.link;
            graph = outer?.graph;
            continue;
        }
        const node = graph.getNodeById(link.origin_id);
        if (!node) return null;
        if (node.subgraph) {
            linkId = node.subgraph.outputs?.[link.origin_slot]?.linkIds?.[0];
            graph = node.subgraph;
            continue;
        }
        const passes = node.type === "Reroute" || node.mode === BYPASSED;
        if (!passes) {
            const address = addressOf(node, link.origin_slot);
            if (address) return {address, exact};
            exact = false;
        }
        linkId = (node.inputs ?? []).find(input => (
            input.link != null && (node.type === "Reroute" || input.type === "IMAGE")))?.link;
    }
    return null;
}

// The node in some graph above whose inside a subgraph is.
function outerNode(inner) {
    const open = [app.rootGraph ?? app.graph];
    const seen = new Set();
    while (open.length > 0) {
        const graph = open.pop();
        if (!graph || seen.has(graph)) continue;
        seen.add(graph);
        for (const node of graph.nodes ?? []) {
            if (node.subgraph === inner) return node;
            if (node.subgraph) open.push(node.subgraph);
        }
    }
    return null;
}

// The picture at an output of a node, as far as the page has it.
function addressOf(node, slot) {
    const file = node.widgets?.find(widget => widget.name === "image")?.value;
    if (typeof file === "string" && file) return fileAddress(file);
    const own = previewOf(node);
    if (own) return own;
    // Somebody else may show the same picture: a preview or a saved image.
    for (const id of node.outputs?.[slot]?.links ?? []) {
        const link = linkOf(node.graph, id);
        const other = link && node.graph.getNodeById(link.target_id);
        const address = other && previewOf(other);
        if (address) return address;
    }
    return null;
}

// What a node last sent to the page.
function outputOf(node) {
    const inner = node.graph && node.graph !== (app.rootGraph ?? app.graph);
    const key = inner ? `${node.graph.id}:${node.id}` : String(node.id);
    return app.nodeOutputs?.[key];
}

// The first image of what a node last showed.
function previewOf(node) {
    const image = outputOf(node)?.images?.[0];
    if (image?.filename) return viewAddress(image.filename, image.type, image.subfolder);
    return node.imgs?.[0]?.src || null;
}

// A file as load nodes name it: with its folder, and "[output]" or the like behind.
function fileAddress(text) {
    const [, path, type] = /^(.*?)(?: \[(\w+)\])?$/s.exec(text);
    const cut = path.lastIndexOf("/");
    return viewAddress(path.slice(cut + 1), type ?? "input", cut < 0 ? "" : path.slice(0, cut));
}

function viewAddress(filename, type = "output", subfolder = "") {
    const query = new URLSearchParams({filename, type, subfolder});
    return api.apiURL(`/view?${query}`);
}
