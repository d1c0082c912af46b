// The extension: gives the motion field of Draw Flow its editor, in both of ComfyUI's renderers.

import {api} from "../../../scripts/api.js";
import {app} from "../../../scripts/app.js";
import {Editor} from "./editor.js";
import {arrivedPicture, choosePicture, isConnected, pictureOf} from "./picture.js";

const NODE = "S2DMDrawFlow";
const WIDGET = "S2DM_MOTION";
const FIELD = "motion";
const SIZE = {width: 640, height: 660};
const LEAST_HEIGHT = 420;

app.registerExtension({
    name: "S2DM.MotionEditor",

    // Without this script the field stays the text field that the node declares.
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (nodeData.name !== NODE) return;
        for (const inputs of [nodeData.input?.required, nodeData.input?.optional]) {
            const spec = inputs?.[FIELD];
            if (spec) inputs[FIELD] = [spec[0], {...spec[1], widgetType: WIDGET}];
        }
    },

    getCustomWidgets() {
        return {[WIDGET]: (node, name, spec) => addEditor(node, name, spec)};
    },
});

function addEditor(node, name, spec) {
    addStyle();
    keepFingers();
    let widget = null;
    const read = (field, fallback) => {
        const value = node.widgets?.find(other => other.name === field)?.value;
        return Number.isFinite(value) && value >= 1 ? Math.round(value) : fallback;
    };
    const editor = new Editor({
        size: () => ({
            width: read("width", 512), height: read("height", 512), frames: read("frames", 16),
        }),
        changed: text => {
            widget.callback?.(text);
            node.graph?.setDirtyCanvas?.(true);
            keepForUndo();
        },
        connected: () => isConnected(node, "image"),
        linked: () => isConnected(node, name),
        choosePicture: file => choosePicture(node, file).then(
            () => pictures.refresh(true), error => editor.say(error.message)),
        wheelOutside: event => {
            // In Nodes 2.0 the node itself hands the wheel on to the graph.
            if (!editor.root.closest("[data-node-id]")) app.canvas.processMouseWheel(event);
        },
        pointerOutside: event => handToGraph(event),
    });
    widget = node.addDOMWidget(name, WIDGET, editor.root, {
        getValue: () => editor.value,
        setValue: text => { editor.value = text; },
        getMinHeight: () => LEAST_HEIGHT,
        hideOnZoom: false,
        margin: 6,
    });
    if (typeof spec?.[1]?.default === "string") editor.value = spec[1].default;
    const pictures = watchPicture(node, editor);
    return {widget, minWidth: SIZE.width, minHeight: SIZE.height};
}

// Keep the editor's picture and size those of the node, whatever changes them.
function watchPicture(node, editor) {
    let shown = null;
    let arrived = {address: null, made: null}; // of the last run, and the picture it was made of
    // What the last run got is better than a guess, until another picture comes in.
    const best = () => {
        const found = node.graph ? pictureOf(node, "image") : null;
        const address = node.graph ? arrivedPicture(node) : null;
        if (address !== arrived.address) arrived = {address, made: found?.address};
        const fits = found && !found.exact && address && arrived.made === found.address;
        return fits ? {address, exact: true} : found;
    };
    const refresh = (again = false) => {
        if (node.graph) takePlace(node, editor);
        editor.sizeChanged();
        const {address = null, exact = true} = best() ?? {};
        if (address === shown && !again) return;
        shown = address;
        if (!address) {
            editor.setPicture(null);
            return;
        }
        const image = new Image();
        image.crossOrigin = "anonymous";
        const current = () => shown === address;
        image.onload = () => { if (current()) editor.setPicture(image, exact); };
        image.onerror = () => { if (current()) editor.setPicture(null); };
        image.src = address;
    };
    const later = () => requestAnimationFrame(() => refresh());
    const events = ["graphChanged", "executed", "execution_success"];
    const stop = () => { for (const event of events) api.removeEventListener(event, later); };
    editor.root.addEventListener("pointerenter", later);
    follow(node, "onConnectionsChange", later);
    follow(node, "onConfigure", later);
    follow(node, "onAdded", () => {
        stop();
        for (const event of events) api.addEventListener(event, later);
        later();
    });
    follow(node, "onRemoved", () => {
        stop();
        editor.pause();
    });
    return {refresh};
}

// Nodes 2.0 keeps the elements of a node that is loaded anew, as ComfyUI's undo does, and with them
// the editor of the node that is gone.
function takePlace(node, editor) {
    if (editor.root.isConnected || app.canvas?.graph !== node.graph) return;
    const left = document.querySelector(`[data-node-id="${node.id}"] .s2dm-editor`);
    left?.replaceWith(editor.root);
}

// Also do something when ComfyUI calls a hook of this one node.
function follow(node, hook, action) {
    const before = node[hook];
    node[hook] = function (...values) {
        const result = before?.apply(this, values);
        action();
        return result;
    };
}

// ComfyUI notes a step of its own undo.
function keepForUndo() {
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    if (tracker?.captureCanvasState) tracker.captureCanvasState();
    else tracker?.checkState?.();
}

// The middle button moves the graph.
function handToGraph(event) {
    const kind = {
        pointerdown: "processMouseDown", pointermove: "processMouseMove",
        pointerup: "processMouseUp"}[event.type];
    app.canvas[kind]?.(event);
}

// ComfyUI zooms the graph with two fingers wherever they are, before the editor hears of them.
let fingersKept = false;

function keepFingers() {
    if (fingersKept) return;
    fingersKept = true;
    for (const name of ["touchstart", "touchmove", "touchend", "touchcancel"]) {
        window.addEventListener(name, event => {
            if (event.target instanceof Element && event.target.matches(".s2dm-canvas")) {
                event.stopPropagation();
            }
        }, {capture: true, passive: true});
    }
}

function addStyle() {
    const href = new URL("./editor.css", import.meta.url).href;
    if ([...document.styleSheets].some(sheet => sheet.href === href)) return;
    if (document.querySelector("link[data-s2dm]")) return;
    const link = document.createElement("link");
    Object.assign(link, {rel: "stylesheet", href});
    link.dataset.s2dm = "";
    document.head.append(link);
}
