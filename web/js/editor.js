// One editor: what is edited, selected and shown, and the parts that show it.

import {cameraAt} from "./geometry.js";
import {make} from "./dom.js";
import {Panel} from "./panel.js";
import {History, emptyMotion, isEmpty, newLayer, parseMotion, removePoint, rescale, writeMotion}
    from "./state.js";
import {View} from "./view.js";

const FRAMES_A_SECOND = 8;
const LARGEST_PICTURE = 1024; // of the preview's own copy, longer side
const GRID = 32;

/**
 * options.size: () => {width, height, frames}, of the node's own fields.
 * options.changed: called with the new text after each edit.
 * options.choosePicture: called with a File to draw on, where nothing is connected.
 */
export class Editor {
    constructor(options) {
        this.options = options;
        this.tool = "path";
        this.brush = 24;
        this.frame = 0;
        this.playing = null;
        this.layerIndex = -1;
        this.selected = null; // {track, point} or {pin}, indices in the layer
        this.problem = null;
        this.text = "";
        this.motion = emptyMotion(options.size());
        this.history = new History("");
        this.picture = null;
        this.exact = true; // the picture has the size that the motion is drawn in
        // An empty title: the field's own tooltip would lie over the picture.
        this.root = make("div", {class: "s2dm-editor widget-expands", title: ""});
        this.view = new View(this);
        this.panel = new Panel(this);
        this.panel.build(this.view.stage);
        this.listen();
        this.setPicture(null);
    }

    // --- the text

    get value() { return this.text; }

    set value(text) {
        const next = typeof text === "string" ? text : text == null ? "" : JSON.stringify(text);
        if (next === this.text && !this.problem) return;
        this.show(next);
        this.history.reset(next);
    }

    // Show a text as it is; one that is no motion stays untouched until it is edited.
    show(text) {
        const {width, height} = this.motion;
        this.text = text;
        try {
            this.motion = parseMotion(text, this.options.size());
            this.problem = null;
        } catch (error) {
            this.motion = emptyMotion(this.options.size());
            this.problem = error.message;
        }
        this.fitSize();
        const resized = width !== this.motion.width || height !== this.motion.height;
        if (resized && this.view.backdrop) this.makeBackdrop();
        this.selected = null;
        this.layerIndex = Math.min(
            Math.max(this.layerIndex, 0), this.motion.layers.length - 1);
        this.refresh();
    }

    /** Change the motion and keep the change. */
    change(edit) {
        edit(this.motion);
        this.commit();
    }

    /** Keep what has been changed. */
    commit() {
        this.text = isEmpty(this.motion) && this.motion.layers.length === 0
            ? "" : writeMotion(this.motion);
        this.problem = null;
        this.history.record(this.text);
        this.options.changed(this.text);
        this.refresh();
    }

    /** Take back what has been changed since the last commit. */
    revert() { this.show(this.text); }

    step(direction) {
        const text = this.history.step(direction);
        if (text === null) return;
        const {selected} = this;
        this.show(text);
        if (this.exists(selected)) this.selected = selected;
        this.options.changed(text);
        this.refresh();
    }

    // --- the picture

    /**
     * Draw on a picture (an image that has loaded); null: on a grid. One that isn't exact may have
     * another size than the picture that comes: it is stretched over what is drawn already.
     */
    setPicture(image, exact = true) {
        this.picture = image;
        this.exact = exact;
        this.fitSize();
        this.makeBackdrop();
        this.refresh();
    }

    /** The node's own fields may have changed. */
    sizeChanged() {
        const {width, height} = this.motion;
        this.fitSize();
        if (!this.picture && (width !== this.motion.width || height !== this.motion.height)) {
            this.makeBackdrop();
        }
        this.frame = Math.min(this.frame, this.frames - 1);
        this.refresh();
    }

    // The motion is drawn in pixels of the picture that it moves.
    fitSize() {
        const size = this.options.size();
        this.motion.frames = size.frames;
        if (this.picture && !this.exact && !isEmpty(this.motion)) return;
        const width = this.picture?.naturalWidth ?? size.width;
        const height = this.picture?.naturalHeight ?? size.height;
        if (width !== this.motion.width || height !== this.motion.height) {
            rescale(this.motion, width, height);
        }
    }

    makeBackdrop() {
        const {width, height} = this.motion;
        const shrink = Math.min(1, LARGEST_PICTURE / Math.max(width, height));
        const canvas = document.createElement("canvas");
        canvas.width = Math.max(1, Math.round(width * shrink));
        canvas.height = Math.max(1, Math.round(height * shrink));
        const pen = canvas.getContext("2d", {willReadFrequently: true});
        if (this.picture) {
            pen.drawImage(this.picture, 0, 0, canvas.width, canvas.height);
        } else {
            pen.fillStyle = "#3a3d42";
            pen.fillRect(0, 0, canvas.width, canvas.height);
            pen.fillStyle = "#44484e";
            for (let y = 0; y < canvas.height; y += GRID) {
                for (let x = y / GRID % 2 * GRID; x < canvas.width; x += 2 * GRID) {
                    pen.fillRect(x, y, GRID, GRID);
                }
            }
        }
        this.view.setBackdrop(canvas);
    }

    // --- time

    get frames() { return Math.max(1, this.options.size().frames); }

    /** The time from 0 to 1 that is shown. */
    get time() { return this.frames > 1 ? this.frame / (this.frames - 1) : 0; }

    get camera() { return cameraAt(this.motion.camera, this.time); }

    goTo(frame) {
        this.pause();
        this.frame = Math.min(this.frames - 1, Math.max(0, frame));
        this.refresh();
    }

    play() {
        if (this.playing || this.frames < 2) return;
        if (this.frame >= this.frames - 1) this.frame = 0;
        this.playing = {since: performance.now(), from: this.frame};
        this.refresh();
    }

    pause() {
        if (!this.playing) return;
        this.playing = null;
        this.frame = Math.round(this.frame);
        this.refresh();
    }

    toggle() {
        if (this.playing) this.pause();
        else this.play();
    }

    // --- what is selected

    get layer() { return this.motion.layers[this.layerIndex] ?? null; }

    /** The layer to draw into; a new one where there is none. */
    needLayer() {
        if (!this.layer) this.addLayer();
        return this.layer;
    }

    addLayer() {
        this.motion.layers.push(newLayer(this.motion));
        this.layerIndex = this.motion.layers.length - 1;
        this.selected = null;
    }

    exists(selected) {
        if (!selected || !this.layer) return false;
        if (selected.pin !== undefined) return selected.pin < this.layer.pins.length;
        return selected.point < (this.layer.tracks[selected.track]?.length ?? 0);
    }

    /** The selected point or pin itself. */
    get point() {
        if (!this.exists(this.selected)) return null;
        const {pin, track, point} = this.selected;
        return pin !== undefined ? this.layer.pins[pin] : this.layer.tracks[track][point];
    }

    select(layerIndex, selected) {
        this.layerIndex = layerIndex;
        this.selected = selected;
        this.refresh();
    }

    setTool(tool) {
        this.view.finishPath();
        this.tool = tool;
        this.refresh();
    }

    deleteSelected() {
        if (!this.exists(this.selected)) return;
        const {pin, track, point} = this.selected;
        const {layer} = this;
        this.selected = null;
        if (pin !== undefined) layer.pins.splice(pin, 1);
        else if (layer.tracks[track].length <= 2) layer.tracks.splice(track, 1);
        else {
            removePoint(layer.tracks[track], point);
            this.selected = {track, point: Math.max(0, point - 1)};
        }
        this.commit();
    }

    // --- showing, keys and the clipboard

    /** Show the state anew, at the next chance to draw. */
    refresh() {
        if (this.waiting) return;
        this.waiting = true;
        requestAnimationFrame(now => {
            this.waiting = false;
            if (!this.root.isConnected) return;
            if (this.playing) {
                const passed = (now - this.playing.since) / 1000 * FRAMES_A_SECOND;
                this.frame = (this.playing.from + Math.max(0, passed)) % this.frames;
                if (this.frame > this.frames - 1) this.frame = this.frames - 1;
            }
            this.view.draw();
            this.panel.update();
            if (this.playing) this.refresh();
        });
    }

    listen() {
        const {root, view} = this;
        // ComfyUI hears nothing of what happens in here. Its own undo reads the focus before any
        // other listener: it leaves text fields alone, so the keys go to one.
        root.addEventListener("keydown", event => {
            event.stopPropagation();
            const own = event.target.matches("input[type=text], input[type=number], .s2dm-json *");
            if (own) return;
            if (event.key === "Control" || event.key === "Meta") view.keys.focus({preventScroll: true});
            const inControl = event.target !== view.keys;
            if (this.pressed(event, inControl)) event.preventDefault();
        });
        root.addEventListener("keyup", event => event.stopPropagation());
        for (const name of ["pointerdown", "pointermove", "pointerup", "click", "dblclick"]) {
            root.addEventListener(name, event => event.stopPropagation());
        }
        root.addEventListener("contextmenu", event => {
            event.stopPropagation();
            if (!event.target.matches("input, textarea")) event.preventDefault();
        });
        root.addEventListener("click", event => {
            // A mouse on a button leaves the keys where they are: on the picture.
            if (event.detail > 0 && event.target.closest("button")
                && !event.target.closest(".s2dm-json")) view.keys.focus({preventScroll: true});
        });
        // In Nodes 2.0 the tooltip waits for the mouse to leave what the editor lies in.
        root.addEventListener("mouseenter", () => {
            root.parentElement?.dispatchEvent(new MouseEvent("mouseleave"));
        });
        // The wheel is ours once the editor has the focus: this is how Nodes 2.0 is told.
        root.addEventListener("focusin", () => root.setAttribute("data-capture-wheel", "true"));
        root.addEventListener("focusout", () => root.removeAttribute("data-capture-wheel"));
        root.addEventListener("copy", event => this.copied(event));
        root.addEventListener("cut", event => this.copied(event, true));
        root.addEventListener("paste", event => {
            event.stopPropagation();
            if (event.target !== view.keys) return;
            event.preventDefault();
            const file = [...event.clipboardData.files].find(f => f.type.startsWith("image/"));
            if (file) this.options.choosePicture(file);
            else this.paste(event.clipboardData.getData("text/plain"));
        });
    }

    copied(event, cut = false) {
        event.stopPropagation();
        if (event.target !== this.view.keys) return;
        event.preventDefault();
        event.clipboardData.setData("text/plain", writeMotion(this.motion));
        if (cut) this.change(motion => {
            motion.layers = [];
            motion.camera = [];
            this.layerIndex = -1;
            this.selected = null;
        });
    }

    /** Take a whole motion, or lists of points as one more layer; what is wrong is said. */
    paste(text) {
        let motion;
        try {
            if (text.trim() === "") throw new Error("There is no text to paste.");
            motion = parseMotion(text, this.motion);
        } catch (error) {
            this.say(error.message);
            return false;
        }
        const whole = text.trim().startsWith("{");
        if (whole) {
            const {width, height} = this.motion;
            rescale(motion, width, height);
            this.motion = motion;
        } else {
            this.motion.layers.push(...motion.layers);
        }
        this.layerIndex = this.motion.layers.length - 1;
        this.selected = null;
        this.commit();
        return true;
    }

    /** Say something over the picture for some seconds. */
    say(text) { this.panel.say(text); }

    // One key; true where it means something here.
    pressed(event, inControl) {
        const {key} = event;
        if (event.ctrlKey || event.metaKey) {
            if (key.toLowerCase() === "z") this.step(event.shiftKey ? 1 : -1);
            else if (key.toLowerCase() === "y") this.step(1);
            else if (key.toLowerCase() === "d") this.panel.duplicateLayer();
            else return false;
            return true;
        }
        // On a button, slider or list, these keys are its own.
        if (inControl && /^(Arrow|Home|End|Page|Enter|Tab| )/.test(key)) return false;
        const tool = {v: "select", p: "path", i: "pin", b: "brush", e: "erase", l: "lasso"}[
            key.toLowerCase()];
        if (tool && !event.altKey) {
            this.setTool(tool);
            return true;
        }
        const nudge = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[
            key];
        if (nudge) {
            if (this.point) this.change(() => {
                this.point.x += nudge[0] * (event.shiftKey ? 10 : 1);
                this.point.y += nudge[1] * (event.shiftKey ? 10 : 1);
            });
            else if (nudge[0]) this.goTo(Math.round(this.frame) + nudge[0]);
            else return false;
            return true;
        }
        switch (key) {
        case " ":
            if (!event.repeat) this.toggle();
            break;
        case ",": this.goTo(Math.round(this.frame) - 1); break;
        case ".": this.goTo(Math.round(this.frame) + 1); break;
        case "Home": this.goTo(0); break;
        case "End": this.goTo(this.frames - 1); break;
        case "Delete":
        case "Backspace": this.deleteSelected(); break;
        case "Enter": this.view.finishPath(); break;
        case "Escape":
            if (!this.view.cancel()) this.select(this.layerIndex, null);
            break;
        case "[": this.setBrush(this.brush / 1.25); break;
        case "]": this.setBrush(this.brush * 1.25); break;
        case "0": this.view.fit(); break;
        case "+":
        case "=": this.view.zoomBy(1.25); break;
        case "-": this.view.zoomBy(0.8); break;
        default: return false;
        }
        return true;
    }

    setBrush(size) {
        this.brush = Math.min(512, Math.max(2, size));
        this.refresh();
    }
}
