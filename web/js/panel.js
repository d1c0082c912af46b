// Everything around the picture: tools, time, layers, and the fields of what is selected.

import {assign, icon, iconButton, make, relabel, setAttribute} from "./dom.js";
import {arrival, firstPhaseAt, timesOf} from "./geometry.js";
import {MOVES, REPEATS, SPEEDS, newLayer, removeKey, setCamera, setTime, spreadTimes, writeMotion}
    from "./state.js";
import {COLOURS} from "./view.js";

const TOOLS = [
    ["select", "Select (V)", "Drag points, pins or the path itself; Shift: the whole path. Drag beside them: move the view."],
    ["path", "Path (P)", "Drag to draw a path by hand, or click point by point; Enter ends it."],
    ["pin", "Pin (I)", "Click what is to stay where it is."],
    ["brush", "Brush (B)", "Paint what the layer moves. [ and ]: size."],
    ["erase", "Eraser (E)", "Take painted parts out of the layer. [ and ]: size."],
    ["lasso", "Lasso (L)", "Draw around what the layer moves."],
];
const CAMERA = [
    ["x", "Pan x", 1, "How far the camera moves to the right, in pixels"],
    ["y", "Pan y", 1, "How far the camera moves down, in pixels"],
    ["zoom", "Zoom", 0.01, "How much larger everything gets; 1: as it is"],
    ["roll", "Roll", 0.5, "How far the camera turns clockwise, in degrees"],
];

export class Panel {
    constructor(editor) { this.editor = editor; }

    build(stage) {
        const {editor} = this;
        this.hint = make("div", {class: "s2dm-hint"});
        this.message = make("div", {class: "s2dm-message", role: "status", hidden: true});
        stage.append(this.hint, this.message);
        this.buildJson(stage);
        editor.root.append(
            this.buildTools(),
            make("div", {class: "s2dm-body"}, stage, make("div", {class: "s2dm-side"},
                this.buildLayers(), this.buildLayer(), this.buildPoint(), this.buildCamera())),
            this.buildTime());
    }

    // --- above the picture

    buildTools() {
        const {editor} = this;
        this.tools = new Map(TOOLS.map(([name, title]) => [
            name, iconButton(name, title, () => editor.setTool(name), {"aria-pressed": "false"})]));
        this.undo = iconButton("undo", "Undo (Ctrl+Z)", () => editor.step(-1));
        this.redo = iconButton("redo", "Redo (Ctrl+Shift+Z)", () => editor.step(1));
        this.brush = make("input", {
            type: "range", min: 2, max: 256, step: 1, title: "Size of the brush, in pixels",
            "aria-label": "Size of the brush, in pixels", class: "s2dm-brush",
            oninput: () => editor.setBrush(this.brush.valueAsNumber),
        });
        const file = make("input", {
            type: "file", accept: "image/*", hidden: true, tabindex: "-1", onchange: () => {
                if (file.files[0]) editor.options.choosePicture(file.files[0]);
                file.value = "";
            },
        });
        this.choose = iconButton(
            "picture", "Choose a picture to draw on", () => file.click());
        return make("div", {class: "s2dm-bar", role: "toolbar", "aria-label": "Tools"},
            ...this.tools.values(), this.brush, make("span", {class: "s2dm-space"}),
            this.undo, this.redo, make("span", {class: "s2dm-line"}),
            this.choose, file,
            iconButton("fit", "Show the whole picture (0)", () => editor.view.fit()),
            iconButton("json", "Copy or paste as JSON", () => this.openJson()));
    }

    // --- below the picture

    buildTime() {
        const {editor} = this;
        this.playButton = iconButton("play", "Play (Space)", () => editor.toggle());
        this.time = make("input", {
            type: "range", min: 0, step: 1, class: "s2dm-time", title: "Frame",
            "aria-label": "Frame", oninput: () => editor.goTo(this.time.valueAsNumber),
        });
        this.marks = make("div", {class: "s2dm-marks"});
        this.readout = make("output", {class: "s2dm-readout"});
        return make("div", {class: "s2dm-bar"},
            iconButton("first", "First frame (Home)", () => editor.goTo(0)), this.playButton,
            make("div", {class: "s2dm-timeline"}, this.marks, this.time), this.readout);
    }

    // --- layers

    buildLayers() {
        const {editor} = this;
        this.list = make("div", {class: "s2dm-list", role: "listbox", "aria-label": "Layers"});
        const move = direction => editor.change(({layers}) => {
            const from = editor.layerIndex, to = from + direction;
            [layers[from], layers[to]] = [layers[to], layers[from]];
            editor.layerIndex = to;
        });
        this.layerButtons = {
            up: iconButton("up", "Bring the layer forward", () => move(1)),
            down: iconButton("down", "Send the layer back", () => move(-1)),
            copy: iconButton("copy", "Duplicate the layer (Ctrl+D)", () => this.duplicateLayer()),
            remove: iconButton("remove", "Delete the layer", () => editor.change(({layers}) => {
                layers.splice(editor.layerIndex, 1);
                editor.layerIndex = Math.min(editor.layerIndex, layers.length - 1);
                editor.selected = null;
            })),
        };
        return section("Layers", this.list, [
            iconButton("add", "Add a layer", () => editor.change(() => editor.addLayer())),
            ...Object.values(this.layerButtons)]);
    }

    duplicateLayer() {
        const {editor} = this;
        if (!editor.layer) return;
        editor.change(motion => {
            const copy = structuredClone(editor.layer);
            copy.name = newLayer(motion).name;
            motion.layers.splice(editor.layerIndex + 1, 0, copy);
            editor.layerIndex += 1;
        });
    }

    updateLayers() {
        const {editor} = this;
        const {layers} = editor.motion;
        const shown = JSON.stringify([
            editor.layerIndex, layers.map(({name, visible}) => [name, visible])]);
        for (const [name, button] of Object.entries(this.layerButtons)) {
            assign(button, {disabled: !editor.layer
                || name === "up" && editor.layerIndex === layers.length - 1
                || name === "down" && editor.layerIndex === 0});
        }
        if (shown === this.shownLayers) return;
        this.shownLayers = shown;
        const rows = layers.map((layer, index) => this.layerRow(layer, index)).reverse();
        this.list.replaceChildren(...rows.length ? rows : [
            make("p", {class: "s2dm-note"}, "Draw a path on what is to move.")]);
    }

    // The row is rebuilt with the list, so its listeners ask for the layer by its place.
    layerRow(layer, index) {
        const {editor} = this;
        const seen = layer.visible !== false;
        const name = make("button", {
            type: "button", class: "s2dm-name", title: "Select; double-click to rename",
            onclick: () => editor.select(index, null), ondblclick: () => rename(),
            onkeydown: event => { if (event.key === "F2") rename(); },
        }, layer.name);
        const rename = () => {
            const field = make("input", {
                type: "text", class: "s2dm-name", value: layer.name, "aria-label": "Layer's name",
                onkeydown: event => {
                    if (event.key === "Enter") field.blur();
                    if (event.key === "Escape") {
                        field.value = layer.name;
                        field.blur();
                    }
                },
                onblur: () => {
                    this.shownLayers = null;
                    const text = field.value.trim();
                    const now = editor.motion.layers[index];
                    if (text && now && text !== now.name) editor.change(() => { now.name = text; });
                    else editor.refresh();
                },
            });
            name.replaceWith(field);
            field.focus();
            field.select();
        };
        const chosen = index === editor.layerIndex;
        const swatch = make("span", {class: "s2dm-swatch"});
        swatch.style.background = COLOURS[index % COLOURS.length];
        return make("div", {
            class: "s2dm-row", role: "option", "aria-selected": String(chosen),
        }, swatch, name, iconButton(
            seen ? "seen" : "unseen", seen ? "Leave the layer out" : "Use the layer",
            () => editor.change(({layers}) => {
                if (layers[index].visible === false) delete layers[index].visible;
                else layers[index].visible = false;
            })));
    }

    // --- the selected layer, its selected point

    buildLayer() {
        const {editor} = this;
        const set = (name, value) => editor.change(() => { editor.layer[name] = value; });
        this.move = choice("Move", MOVES, "How the layer follows several paths and pins: bent between them, or one map for all of it", set);
        this.speed = choice("Speed", SPEEDS, "How fast the paths are followed", set);
        this.repeat = choice("Repeat", REPEATS, "What happens over the clip", set);
        this.cycles = field("Times", {
            min: 1, max: 100, step: 1, title: "How many times within the clip",
        }, value => { editor.layer.cycles = value; }, editor);
        this.radius = slider("Radius", {
            min: 1, step: 1, title: "How far around its paths' starts a layer without a region moves things; fading out to twice as far",
        }, value => { editor.layer.radius = value; }, editor);
        this.noRegion = iconButton("close", "Remove the region", () => set("region", null));
        this.region = make("div", {class: "s2dm-field"}, make("span", {}, "Region"),
            make("span", {class: "s2dm-note"}, "as painted"), this.noRegion);
        this.layerSection = section("Layer", make("div", {class: "s2dm-fields"},
            this.radius.row, this.region, this.move.row, this.speed.row, this.repeat.row,
            this.cycles.row));
        return this.layerSection;
    }

    updateLayer() {
        const {layer, motion} = this.editor;
        assign(this.layerSection, {hidden: !layer});
        if (!layer) return;
        this.move.show(layer.move);
        this.speed.show(layer.speed);
        this.repeat.show(layer.repeat);
        this.cycles.show(layer.cycles);
        assign(this.cycles.row, {hidden: layer.repeat === "once"});
        this.radius.show(layer.radius, {max: Math.max(motion.width, motion.height)});
        assign(this.radius.row, {hidden: layer.region !== null});
        assign(this.region, {hidden: layer.region === null});
    }

    buildPoint() {
        const {editor} = this;
        this.pointName = make("span", {class: "s2dm-note"});
        this.arrives = field("Frame", {
            min: 1, step: 0.1, title: "The frame in which the path arrives at this point",
        }, value => {
            const {track, point} = editor.selected;
            const time = (value - 1) / Math.max(1, editor.frames - 1);
            setTime(editor.layer.tracks[track], point,
                firstPhaseAt(editor.layer, time, editor.frames));
        }, editor);
        this.even = iconButton("even", "Move at an even speed along the path", () => editor.change(
            () => spreadTimes(editor.layer.tracks[editor.selected.track])));
        this.removePath = iconButton("remove", "Delete the whole path", () => editor.change(() => {
            editor.layer.tracks.splice(editor.selected.track, 1);
            editor.selected = null;
        }));
        this.pointSection = section("Point", make("div", {class: "s2dm-fields"},
            this.pointName, this.arrives.row), [this.even, this.removePath]);
        return this.pointSection;
    }

    updatePoint() {
        const {editor} = this;
        const {point, selected, layer} = editor;
        assign(this.pointSection, {hidden: !point});
        if (!point) return;
        const onPath = selected.pin === undefined;
        const place = `${Math.round(point.x)}, ${Math.round(point.y)}`;
        assign(this.pointName, {textContent: onPath
            ? `${selected.point + 1} of ${layer.tracks[selected.track].length} at ${place}`
            : `Pin at ${place}`});
        for (const part of [this.arrives.row, this.even, this.removePath]) {
            assign(part, {hidden: !onPath});
        }
        if (!onPath) return;
        const track = layer.tracks[selected.track];
        assign(this.even, {disabled: track.length < 3});
        const when = 1 + arrival(layer, timesOf(track)[selected.point], editor.frames) * (editor.frames - 1);
        this.arrives.show(Math.round(when * 10) / 10);
    }

    // --- the camera

    buildCamera() {
        const {editor} = this;
        const set = name => value => {
            // Frame 1 is the picture as it is: what is set there is where the camera ends.
            if (editor.frame === 0 && editor.frames > 1) editor.frame = editor.frames - 1;
            setCamera(editor.motion, editor.time, editor.camera, {[name]: value});
        };
        this.camera = new Map(CAMERA.map(([name, label, step, title]) => [
            name, slider(label, {step, title}, set(name), editor)]));
        this.key = iconButton("key", "Set a keyframe at this frame", () => editor.change(motion => {
            if (this.keyHere()) removeKey(motion, editor.time);
            else setCamera(motion, editor.time, editor.camera, {});
        }));
        this.noCamera = iconButton("close", "Hold the camera still", () => editor.change(
            motion => { motion.camera = []; }));
        return section("Camera", make("div", {class: "s2dm-fields"},
            ...[...this.camera.values()].map(({row}) => row)), [this.key, this.noCamera]);
    }

    keyHere() {
        const {motion, time} = this.editor;
        return motion.camera.some(key => Math.abs(key.t - time) < 1e-3);
    }

    updateCamera() {
        const {editor} = this;
        const {motion, camera} = editor;
        const most = {x: motion.width, y: motion.height, roll: 180};
        for (const [name, {show}] of this.camera) {
            const range = name === "zoom"
                ? {min: 0.25, max: 4} : {min: -most[name], max: most[name]};
            show(Math.round(camera[name] * 1000) / 1000, range);
        }
        const here = this.keyHere();
        this.key.classList.toggle("s2dm-on", here);
        assign(this.key, {disabled: editor.frame === 0});
        relabel(this.key, "key", here
            ? "Remove the keyframe at this frame" : "Set a keyframe at this frame");
        assign(this.noCamera, {disabled: motion.camera.length === 0});
    }

    // --- as JSON

    buildJson(stage) {
        this.jsonText = make("textarea", {
            spellcheck: "false", "aria-label": "The motion as JSON",
            onkeydown: event => { if (event.key === "Escape") this.closeJson(); },
        });
        const copy = make("button", {type: "button", class: "s2dm-text", onclick: async () => {
            this.jsonText.select();
            // The clipboard is closed to pages that are not served securely.
            if (navigator.clipboard) await navigator.clipboard.writeText(this.jsonText.value);
            else document.execCommand("copy");
        }}, "Copy");
        const apply = make("button", {type: "button", class: "s2dm-text", onclick: () => {
            if (this.editor.paste(this.jsonText.value)) this.closeJson();
        }}, "Apply");
        this.json = make("div", {class: "s2dm-json", role: "dialog", hidden: true,
            "aria-label": "The motion as JSON"},
        make("p", {class: "s2dm-note"},
            "The motion, or lists of {x, y} points from another editor, which become a layer."),
        this.jsonText, make("div", {class: "s2dm-bar"}, copy, apply,
            make("span", {class: "s2dm-space"}),
            iconButton("close", "Close", () => this.closeJson())));
        stage.append(this.json);
    }

    openJson() {
        const {editor} = this;
        this.jsonText.value = editor.problem ? editor.text : writeMotion(editor.motion);
        this.json.hidden = false;
        setTimeout(() => this.jsonText.focus());
    }

    closeJson() {
        this.json.hidden = true;
        this.editor.view.keys.focus({preventScroll: true});
    }

    // --- all of it

    say(text) {
        clearTimeout(this.saying);
        this.said = text;
        this.saying = setTimeout(() => {
            this.said = null;
            this.editor.refresh();
        }, 6000);
        this.editor.refresh();
    }

    update() {
        const {editor} = this;
        for (const [name, button] of this.tools) {
            setAttribute(button, "aria-pressed", String(name === editor.tool));
        }
        const paints = editor.tool === "brush" || editor.tool === "erase";
        assign(this.brush, {hidden: !paints, value: String(Math.round(editor.brush))});
        assign(this.undo, {disabled: !editor.history.canUndo});
        assign(this.redo, {disabled: !editor.history.canRedo});
        assign(this.choose, {disabled: editor.options.connected()});
        assign(this.hint, {
            textContent: editor.options.linked() ? "The motion comes from the connected node."
                : TOOLS.find(([name]) => name === editor.tool)[2],
            hidden: Boolean(editor.playing || editor.view.gesture),
        });
        const message = this.said ?? editor.problem ?? "";
        assign(this.message, {textContent: message, hidden: message === ""});
        const frame = Math.round(editor.frame) + 1;
        assign(this.time, {
            max: String(editor.frames - 1), value: String(frame - 1), disabled: editor.frames < 2});
        assign(this.playButton, {disabled: editor.frames < 2});
        assign(this.readout, {textContent: `${frame} / ${editor.frames}`});
        relabel(this.playButton, editor.playing ? "pause" : "play",
            editor.playing ? "Pause (Space)" : "Play (Space)");
        this.updateMarks();
        if (editor.playing) return;
        this.updateLayers();
        this.updateLayer();
        this.updatePoint();
        this.updateCamera();
    }

    updateMarks() {
        const times = this.editor.motion.camera.map(({t}) => t).filter(t => t > 0);
        const shown = times.join();
        if (shown === this.shownMarks) return;
        this.shownMarks = shown;
        this.marks.replaceChildren(...times.map(t => {
            const mark = make("span", {class: "s2dm-mark", title: "Camera's keyframe"}, icon("key"));
            mark.style.left = `${t * 100}%`;
            return mark;
        }));
    }
}

function section(title, content, buttons = []) {
    return make("section", {class: "s2dm-section"},
        make("div", {class: "s2dm-head"}, make("h4", {}, title), ...buttons), content);
}

function choice(label, values, title, set) {
    const select = make("select", {title, "aria-label": label,
        onchange: () => set(label.toLowerCase(), select.value)},
    ...values.map(value => make("option", {value}, value.replace("_", " "))));
    return {
        row: make("label", {class: "s2dm-field", title}, make("span", {}, label), select),
        show: value => assign(select, {value}),
    };
}

// A number: `set` as it changes, kept when the change is done.
function numberInput(label, attributes, set, editor) {
    const input = make("input", {type: "number", "aria-label": label, ...attributes});
    const read = () => {
        const {valueAsNumber: value, min, max} = input;
        if (!Number.isFinite(value)) return null;
        return Math.min(max === "" ? Infinity : +max, Math.max(min === "" ? -Infinity : +min, value));
    };
    input.addEventListener("change", () => {
        const value = read();
        if (value !== null) editor.change(() => set(value));
        else editor.refresh();
    });
    input.addEventListener("keydown", event => {
        if (event.key === "Escape" || event.key === "Enter") editor.view.keys.focus();
    });
    return input;
}

function field(label, attributes, set, editor) {
    const input = numberInput(label, attributes, set, editor);
    return {
        row: make("label", {class: "s2dm-field", title: attributes.title},
            make("span", {}, label), input),
        show: value => { if (document.activeElement !== input) assign(input, {value: String(value)}); },
    };
}

function slider(label, attributes, set, editor) {
    const input = numberInput(label, attributes, set, editor);
    const range = make("input", {type: "range", "aria-label": label, ...attributes,
        oninput: () => {
            set(range.valueAsNumber);
            editor.refresh();
        },
        onchange: () => editor.commit(),
        // A double-click takes the middle: no pan, no roll.
        ondblclick: () => {
            if (+range.min < 0) editor.change(() => set(0));
        },
    });
    return {
        row: make("div", {class: "s2dm-field", title: attributes.title},
            make("span", {}, label), range, input),
        show: (value, {min = range.min, max} = {}) => {
            assign(range, {min: String(min), max: String(max)});
            // The control rounds to its step: compare with what it was given.
            if (range.shown !== value || range.max !== range.shownMost) range.value = value;
            range.shown = value;
            range.shownMost = range.max;
            if (document.activeElement !== input) {
                assign(input, {value: String(Math.round(value * 100) / 100)});
            }
        },
    };
}
