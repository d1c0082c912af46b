// The picture with everything drawn on it, and what a pointer does there.

import {assign, make} from "./dom.js";
import {arrival, phaseAt, pointAt, startsOf, timesOf} from "./geometry.js";
import {paintStroke, regionMask, regionOfMask} from "./region.js";
import {distanceToSegment, extendTrack, insertPoint, simplify, spreadTimes} from "./state.js";
import {Warp} from "./warp.js";

export const COLOURS = [
    "#ffb020", "#38bdf8", "#f472b6", "#4ade80", "#c084fc", "#fb7185", "#2dd4bf", "#facc15"];
const MOVING_PIXELS = 200_000; // of the preview while something moves
const STILL_PIXELS = 1_200_000;
const REACH = {mouse: 8, pen: 10, touch: 18}; // how near a pointer must come, CSS pixels
const MASK_SIZE = 1024; // longest side of a painted region
const DRAG = 3; // CSS pixels from which a press is a drag

export class View {
    constructor(editor) {
        this.editor = editor;
        this.quick = null;
        this.fine = new Warp();
        this.zoom = 1;
        this.pan = {x: 0, y: 0};
        this.pointers = new Map();
        this.gesture = null;
        this.hover = null;
        this.open = null; // the path that clicks go on with: {layer, track}
        this.canvas = make("canvas", {class: "s2dm-canvas"});
        // Keys and the clipboard work on the picture through a text field that shows nothing.
        this.keys = make("textarea", {
            class: "s2dm-keys", readonly: true, inputmode: "none", tabindex: "0",
            "aria-label": "Motion on the picture. V, P, I, B, E, L: tools; Space: play; "
                + "arrows: move the point or the frame; Delete: delete the point",
        });
        this.stage = make("div", {class: "s2dm-stage"}, this.canvas, this.keys);
        this.buffer = document.createElement("canvas");
        this.listen();
        new ResizeObserver(() => editor.refresh()).observe(this.stage);
    }

    /** Show a picture, a canvas, where nothing has moved yet. */
    setBackdrop(canvas) {
        this.backdrop = canvas;
        this.quick = null;
        this.fine.setPicture(
            canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height));
    }

    // While something moves the preview is as large as its picture: what stays is only copied.
    quickWarp(width, height) {
        if (this.quick?.width === width && this.quick.height === height) return this.quick;
        const small = document.createElement("canvas");
        small.width = width;
        small.height = height;
        const pen = small.getContext("2d", {willReadFrequently: true});
        pen.drawImage(this.backdrop, 0, 0, width, height);
        this.quick = new Warp();
        this.quick.setPicture(pen.getImageData(0, 0, width, height));
        return this.quick;
    }

    // --- coordinates: CSS pixels of the stage as laid out, and pixels of the picture

    layout() {
        const {camera, motion} = this.editor;
        const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
        const scale = Math.min(width / motion.width, height / motion.height) * 0.96 * this.zoom;
        const angle = camera.roll * Math.PI / 180;
        return {
            width, height, scale, camera,
            left: (width - motion.width * scale) / 2 + this.pan.x,
            top: (height - motion.height * scale) / 2 + this.pan.y,
            cosine: camera.zoom * Math.cos(angle), sine: camera.zoom * Math.sin(angle),
            cx: (motion.width - 1) / 2, cy: (motion.height - 1) / 2,
        };
    }

    // The graph may be zoomed: what is seen and what is laid out differ in size.
    onStage(event) {
        const seen = this.canvas.getBoundingClientRect();
        return {
            x: (event.clientX - seen.left) * this.canvas.clientWidth / seen.width,
            y: (event.clientY - seen.top) * this.canvas.clientHeight / seen.height,
        };
    }

    // Paths lie in the scene, which is seen through the camera.
    onPicture(place) {
        const {left, top, scale, camera, cosine, sine, cx, cy} = this.layout();
        const dx = (place.x - left) / scale - 0.5 + camera.x - cx;
        const dy = (place.y - top) / scale - 0.5 + camera.y - cy;
        const square = camera.zoom * camera.zoom;
        return {
            x: cx + (cosine * dx - sine * dy) / square,
            y: cy + (sine * dx + cosine * dy) / square,
        };
    }

    onScreen({x, y}, {left, top, scale, camera, cosine, sine, cx, cy} = this.layout()) {
        const dx = x - cx, dy = y - cy;
        return {
            x: left + (cx + cosine * dx + sine * dy - camera.x + 0.5) * scale,
            y: top + (cy - sine * dx + cosine * dy - camera.y + 0.5) * scale,
        };
    }

    fit() {
        this.zoom = 1;
        this.pan = {x: 0, y: 0};
        this.editor.refresh();
    }

    zoomBy(factor, place = {x: this.canvas.clientWidth / 2, y: this.canvas.clientHeight / 2}) {
        const fixed = this.onPicture(place);
        this.zoom = Math.min(32, Math.max(0.25, this.zoom * factor));
        const now = this.onScreen(fixed);
        this.pan.x += place.x - now.x;
        this.pan.y += place.y - now.y;
        this.editor.refresh();
    }

    // --- pointers

    listen() {
        const {canvas} = this;
        canvas.addEventListener("pointerdown", event => this.down(event));
        canvas.addEventListener("pointermove", event => this.moved(event));
        canvas.addEventListener("pointerup", event => this.up(event));
        canvas.addEventListener("pointercancel", event => {
            this.pointers.delete(event.pointerId);
            this.cancel();
        });
        canvas.addEventListener("pointerleave", () => {
            this.hover = null;
            this.cursor = null;
            this.editor.refresh();
        });
        // The keys stay with the text field when the picture is pressed.
        canvas.addEventListener("mousedown", event => event.preventDefault());
        canvas.addEventListener("dblclick", event => {
            event.preventDefault();
            this.finishPath();
        });
        canvas.addEventListener("wheel", event => this.wheel(event), {passive: false});
    }

    get active() { return this.editor.root.contains(document.activeElement); }

    // Once the editor is clicked, the wheel zooms the picture; before that, it zooms the graph.
    wheel(event) {
        if (!this.active) {
            this.editor.options.wheelOutside(event);
            return;
        }
        event.preventDefault();
        event.stopPropagation();
        const lines = event.deltaMode === 1 ? 16 : 1;
        this.zoomBy(Math.exp(-event.deltaY * lines * 0.0015), this.onStage(event));
    }

    down(event) {
        if (event.button === 1 && !this.active) {
            this.editor.options.pointerOutside(event);
            return;
        }
        this.keys.focus({preventScroll: true});
        const place = this.onStage(event);
        this.pointers.set(event.pointerId, place);
        this.canvas.setPointerCapture(event.pointerId);
        if (this.pointers.size === 2) {
            this.cancel();
            this.gesture = this.pinch();
            return;
        }
        if (this.pointers.size > 2 || event.button === 2) return;
        this.editor.pause();
        this.reach = REACH[event.pointerType] ?? REACH.mouse;
        const start = {place, point: this.onPicture(place), shift: event.shiftKey};
        if (event.button === 1) this.gesture = this.panning(place);
        else this.gesture = this.begin(this.editor.tool, start);
        this.editor.refresh();
    }

    moved(event) {
        const place = this.onStage(event);
        this.cursor = this.onPicture(place);
        if (this.pointers.has(event.pointerId)) this.pointers.set(event.pointerId, place);
        if (this.gesture) {
            const steps = event.getCoalescedEvents?.() ?? [];
            const points = (steps.length ? steps : [event]).map(step => this.onStage(step));
            this.gesture.move?.(place, points.map(p => this.onPicture(p)), event);
        } else if (event.buttons === 4 && !this.active) {
            this.editor.options.pointerOutside(event);
        } else {
            this.reach = REACH[event.pointerType] ?? REACH.mouse;
            this.hover = this.find(this.onStage(event));
        }
        this.editor.refresh();
    }

    up(event) {
        if (event.button === 1 && !this.gesture) this.editor.options.pointerOutside(event);
        const known = this.pointers.delete(event.pointerId);
        if (!known || !this.gesture) return;
        const {gesture} = this;
        this.gesture = null;
        gesture.end?.(event);
        this.editor.refresh();
    }

    /** Break off what the pointer or a path of clicks is at; false where there is nothing. */
    cancel() {
        const had = this.gesture || this.open;
        if (this.gesture) {
            const {gesture} = this;
            this.gesture = null;
            gesture.undo?.();
        }
        this.finishPath();
        return Boolean(had);
    }

    finishPath() {
        this.open = null;
        this.editor.refresh();
    }

    panning(start) {
        const pan = {...this.pan};
        return {
            pans: true,
            move: place => {
                this.pan = {x: pan.x + place.x - start.x, y: pan.y + place.y - start.y};
            },
        };
    }

    pinch() {
        const measure = () => {
            const [one, other] = [...this.pointers.values()];
            return {
                middle: {x: (one.x + other.x) / 2, y: (one.y + other.y) / 2},
                apart: Math.max(1, Math.hypot(one.x - other.x, one.y - other.y)),
            };
        };
        let last = measure();
        return {
            move: () => {
                if (this.pointers.size < 2) return;
                const now = measure();
                this.pan.x += now.middle.x - last.middle.x;
                this.pan.y += now.middle.y - last.middle.y;
                this.zoomBy(now.apart / last.apart, now.middle);
                last = now;
            },
        };
    }

    begin(tool, start) {
        const found = this.find(start.place);
        if (tool === "pin") return this.placePin(start, found);
        if (tool === "brush" || tool === "erase") return this.paint(start, tool === "brush" ? 1 : 0);
        if (tool === "lasso") return this.lasso(start);
        // Points can be dragged with the path tool too, except while a path goes on by clicks.
        if (found && (tool === "select" || !this.open)) return this.drag(start, found);
        if (tool === "path") return this.drawPath(start);
        this.editor.select(this.editor.layerIndex, null);
        return this.panning(start.place);
    }

    // What lies under a place of the stage: {layer, pin} or {layer, track, point} or, on a path
    // between two points, {layer, track, segment}. The layer in work comes first.
    find(place) {
        const {motion, layerIndex} = this.editor;
        const layout = this.layout();
        const order = [...motion.layers.keys()].reverse().sort(
            (a, b) => (b === layerIndex) - (a === layerIndex));
        const reach = this.reach ?? REACH.mouse;
        const near = point => {
            const screen = this.onScreen(point, layout);
            return Math.hypot(screen.x - place.x, screen.y - place.y) <= reach;
        };
        for (const index of order) {
            const layer = motion.layers[index];
            if (layer.visible === false) continue;
            const pin = layer.pins.findIndex(near);
            if (pin >= 0) return {layer: index, pin};
            for (let track = layer.tracks.length - 1; track >= 0; track -= 1) {
                const point = layer.tracks[track].findLastIndex(near);
                if (point >= 0) return {layer: index, track, point};
            }
        }
        for (const index of order) {
            const layer = motion.layers[index];
            if (layer.visible === false) continue;
            for (const [track, points] of layer.tracks.entries()) {
                const screen = points.map(point => this.onScreen(point, layout));
                for (let k = 0; k + 1 < screen.length; k += 1) {
                    if (distanceToSegment(place, screen[k], screen[k + 1]).distance <= reach * 0.75) {
                        return {layer: index, track, segment: k};
                    }
                }
            }
        }
        return null;
    }

    // Move a point or pin; pressed between two points, bend the path there; with Shift the whole.
    drag(start, found) {
        const {editor} = this;
        editor.select(found.layer, found.pin !== undefined
            ? {pin: found.pin} : {track: found.track, point: found.point ?? found.segment});
        let points = null, last = start.point, began = false;
        return {
            drags: true,
            move: (place, steps) => {
                if (!began && Math.hypot(
                    place.x - start.place.x, place.y - start.place.y) < DRAG) return;
                const {layer} = editor;
                if (!began) {
                    began = true;
                    if (found.pin !== undefined) points = [layer.pins[found.pin]];
                    else if (start.shift) points = layer.tracks[found.track];
                    else {
                        const track = layer.tracks[found.track];
                        let index = found.point;
                        if (index === undefined) {
                            insertPoint(track, found.segment, start.point.x, start.point.y);
                            index = found.segment + 1;
                        }
                        points = [track[index]];
                        editor.selected = {track: found.track, point: index};
                    }
                }
                const now = steps[steps.length - 1];
                for (const point of points) {
                    point.x += now.x - last.x;
                    point.y += now.y - last.y;
                }
                last = now;
            },
            end: () => { if (began) editor.commit(); },
            undo: () => editor.revert(),
        };
    }

    // A drag is a path by hand; clicks are a path point by point.
    drawPath(start) {
        const {editor} = this;
        const line = [start.point];
        return {
            line,
            move: (place, steps) => line.push(...steps),
            end: () => {
                const {scale} = this.layout();
                const length = line.reduce((sum, point, k) => k === 0 ? 0 : sum + Math.hypot(
                    point.x - line[k - 1].x, point.y - line[k - 1].y), 0);
                const layer = editor.needLayer();
                if (length * scale < DRAG * 2) {
                    const {x, y} = start.point;
                    if (this.open?.layer === layer && layer.tracks.includes(this.open.track)) {
                        extendTrack(this.open.track, x, y);
                    } else {
                        layer.tracks.push([{x, y}]);
                        this.open = {layer, track: layer.tracks[layer.tracks.length - 1]};
                    }
                    const index = layer.tracks.indexOf(this.open.track);
                    editor.selected = {track: index, point: this.open.track.length - 1};
                } else {
                    this.open = null;
                    const track = simplify(line, 1.5 / scale).map(({x, y}) => ({x, y}));
                    spreadTimes(track);
                    layer.tracks.push(track);
                    editor.selected = {track: layer.tracks.length - 1, point: track.length - 1};
                }
                editor.commit();
            },
        };
    }

    placePin(start, found) {
        if (found?.pin !== undefined) return this.drag(start, found);
        return {
            end: () => {
                const layer = this.editor.needLayer();
                layer.pins.push({...start.point});
                this.editor.selected = {pin: layer.pins.length - 1};
                this.editor.commit();
            },
        };
    }

    paint(start, value) {
        const {editor} = this;
        const {motion} = editor;
        const layer = editor.needLayer();
        const shrink = Math.min(1, MASK_SIZE / Math.max(motion.width, motion.height));
        const width = Math.max(1, Math.round(motion.width * shrink));
        const height = Math.max(1, Math.round(motion.height * shrink));
        const mask = layer.region
            ? regionMask(layer.region, motion, width, height) : new Uint8Array(width * height);
        const toMask = ({x, y}) => (
            {x: (x + 0.5) * width / motion.width - 0.5, y: (y + 0.5) * height / motion.height - 0.5});
        const radius = editor.brush / 2 * shrink;
        let last = toMask(start.point);
        paintStroke(mask, width, height, last, last, radius, value);
        return {
            mask, maskWidth: width, maskHeight: height,
            move: (place, steps) => {
                for (const step of steps) {
                    const next = toMask(step);
                    paintStroke(mask, width, height, last, next, radius, value);
                    last = next;
                }
                this.tintFor = null;
            },
            end: () => {
                layer.region = regionOfMask(mask, width, height);
                editor.commit();
            },
            undo: () => editor.revert(),
        };
    }

    lasso(start) {
        const {editor} = this;
        const line = [start.point];
        return {
            line, closes: true,
            move: (place, steps) => line.push(...steps),
            end: () => {
                const polygon = simplify([...line, line[0]], 1 / this.layout().scale).slice(0, -1);
                if (polygon.length < 3) return;
                editor.needLayer().region = {polygon: polygon.map(({x, y}) => [x, y])};
                editor.commit();
            },
        };
    }

    // --- drawing

    draw() {
        const {canvas, editor} = this;
        const {motion} = editor;
        const layout = this.layout();
        if (layout.width === 0 || layout.height === 0) return;
        const seen = canvas.getBoundingClientRect();
        const density = Math.min(
            3, Math.max(1, devicePixelRatio * (seen.width / layout.width || 1)));
        const width = Math.round(layout.width * density);
        const height = Math.round(layout.height * density);
        if (canvas.width !== width || canvas.height !== height) {
            canvas.width = width;
            canvas.height = height;
        }
        const pen = canvas.getContext("2d");
        pen.setTransform(density, 0, 0, density, 0, 0);
        pen.clearRect(0, 0, layout.width, layout.height);
        this.drawPicture(pen, layout, density);
        this.drawRegions(pen, layout);
        if (!editor.playing) {
            motion.layers.forEach((layer, index) => {
                if (layer.visible !== false) this.drawLayer(pen, layout, layer, index);
            });
        }
        this.drawMarkers(pen, layout);
        this.drawLine(pen, layout);
        this.drawBrush(pen, layout);
        assign(canvas.style, {cursor: this.cursorStyle()});
    }

    cursorStyle() {
        const {tool} = this.editor;
        if (this.gesture?.pans) return "grabbing";
        if (this.gesture?.drags) return "grabbing";
        if (tool === "brush" || tool === "erase") return "none";
        if (this.hover && (tool === "select" || tool === "path" && !this.open)) {
            return this.hover.segment === undefined ? "grab" : "copy";
        }
        return tool === "select" ? "default" : "crosshair";
    }

    drawPicture(pen, layout, density) {
        const {editor} = this;
        const {motion} = editor;
        const width = motion.width * layout.scale, height = motion.height * layout.scale;
        pen.save();
        pen.fillStyle = "#16171a";
        pen.fillRect(layout.left, layout.top, width, height);
        pen.imageSmoothingEnabled = layout.scale * density < 4;
        if (editor.time === 0) {
            pen.drawImage(editor.picture ?? this.backdrop, layout.left, layout.top, width, height);
        } else {
            const moving = editor.playing || this.gesture;
            const most = moving ? MOVING_PIXELS : STILL_PIXELS;
            const wanted = Math.min(
                layout.scale * density, 1, Math.sqrt(most / (motion.width * motion.height)));
            const columns = Math.max(1, Math.round(motion.width * wanted));
            const rows = Math.max(1, Math.round(motion.height * wanted));
            const warp = moving ? this.quickWarp(columns, rows) : this.fine;
            const image = warp.render(motion, editor.time, columns, rows);
            if (this.buffer.width !== columns || this.buffer.height !== rows) {
                this.buffer.width = columns;
                this.buffer.height = rows;
            }
            this.buffer.getContext("2d").putImageData(image, 0, 0);
            pen.drawImage(this.buffer, layout.left, layout.top, width, height);
        }
        pen.restore();
    }

    // The layer in work shows what it covers: tinted, or the radius around its paths.
    drawRegions(pen, layout) {
        const {editor} = this;
        const {layer, motion} = editor;
        if (editor.playing || !layer || layer.visible === false) return;
        const colour = COLOURS[editor.layerIndex % COLOURS.length];
        const {mask, maskWidth, maskHeight} = this.gesture ?? {};
        pen.save();
        if (layer.region || mask) {
            const tint = this.tint(layer.region, colour, mask, maskWidth, maskHeight);
            pen.globalAlpha = editor.time === 0 || mask ? 0.35 : 0.12;
            const {cosine, sine, scale} = layout;
            const corner = this.onScreen({x: -0.5, y: -0.5}, layout);
            pen.transform(cosine * scale, -sine * scale, sine * scale, cosine * scale,
                corner.x, corner.y);
            pen.drawImage(tint, 0, 0, motion.width, motion.height);
        } else {
            pen.setLineDash([4, 4]);
            pen.strokeStyle = colour;
            pen.globalAlpha = 0.55;
            for (const start of startsOf(layer)) {
                const {x, y} = this.onScreen(start, layout);
                pen.beginPath();
                pen.arc(x, y, layer.radius * layout.scale * layout.camera.zoom, 0, 2 * Math.PI);
                pen.stroke();
            }
        }
        pen.restore();
    }

    tint(region, colour, mask, width, height) {
        const {motion} = this.editor;
        const key = mask ?? region;
        if (this.tintFor === key && this.tintColour === colour) return this.tintCanvas;
        if (!mask) {
            const shrink = Math.min(1, MASK_SIZE / Math.max(motion.width, motion.height));
            width = Math.max(1, Math.round(motion.width * shrink));
            height = Math.max(1, Math.round(motion.height * shrink));
            mask = regionMask(region, motion, width, height);
        }
        const canvas = this.tintCanvas ??= document.createElement("canvas");
        canvas.width = width;
        canvas.height = height;
        const pen = canvas.getContext("2d");
        const image = pen.createImageData(width, height);
        const [red, green, blue] = [1, 3, 5].map(k => parseInt(colour.slice(k, k + 2), 16));
        const packed = new Uint32Array(image.data.buffer);
        const value = (0xff << 24 | blue << 16 | green << 8 | red) >>> 0;
        for (let k = 0; k < mask.length; k += 1) if (mask[k]) packed[k] = value;
        pen.putImageData(image, 0, 0);
        this.tintFor = key;
        this.tintColour = colour;
        return canvas;
    }

    drawLayer(pen, layout, layer, index) {
        const {editor} = this;
        const inWork = index === editor.layerIndex;
        const colour = COLOURS[index % COLOURS.length];
        pen.save();
        pen.globalAlpha = inWork ? 1 : 0.5;
        layer.tracks.forEach((track, number) => {
            const points = track.map(point => this.onScreen(point, layout));
            const selected = inWork && editor.selected?.track === number;
            drawPolyline(pen, points, "rgba(0, 0, 0, 0.65)", selected ? 5 : 4);
            drawPolyline(pen, points, colour, selected ? 2.5 : 1.75);
            drawArrow(pen, points, colour);
            points.forEach((point, k) => {
                const chosen = selected && editor.selected.point === k;
                const over = this.hover?.layer === index && this.hover.track === number
                    && this.hover.point === k;
                dot(pen, point, k === 0 ? 5 : 4 + (over ? 1 : 0), chosen ? "#fff" : colour,
                    k === 0);
            });
            if (selected) this.drawTimes(pen, layer, track, points);
        });
        layer.pins.forEach((pin, number) => {
            const point = this.onScreen(pin, layout);
            const chosen = inWork && editor.selected?.pin === number;
            drawPin(pen, point, colour, chosen);
        });
        pen.restore();
    }

    // The frame in which the movement arrives at each point.
    drawTimes(pen, layer, track, points) {
        const times = timesOf(track);
        const {frames, selected} = this.editor;
        let last = null;
        pen.font = "10px system-ui, sans-serif";
        pen.textBaseline = "middle";
        points.forEach((point, k) => {
            // Where points lie close together, some labels are left out.
            const chosen = selected.point === k;
            if (!chosen && last && Math.hypot(point.x - last.x, point.y - last.y) < 26) return;
            last = point;
            const text = String(
                Math.round((1 + arrival(layer, times[k], frames) * (frames - 1)) * 10) / 10);
            const width = pen.measureText(text).width + 6;
            pen.fillStyle = chosen ? "#fff" : "rgba(0, 0, 0, 0.75)";
            pen.beginPath();
            pen.roundRect(point.x + 7, point.y - 17, width, 13, 3);
            pen.fill();
            pen.fillStyle = chosen ? "#111" : "#eee";
            pen.fillText(text, point.x + 10, point.y - 10);
        });
    }

    // Where each path is at the time shown.
    drawMarkers(pen, layout) {
        const {editor} = this;
        const {motion} = editor;
        if (editor.time === 0) return;
        motion.layers.forEach((layer, index) => {
            if (layer.visible === false) return;
            const phase = phaseAt(layer, editor.time, editor.frames);
            for (const track of layer.tracks) {
                const now = pointAt(track, phase, layer.speed === "hold");
                const place = this.onScreen(now, layout);
                pen.beginPath();
                pen.arc(place.x, place.y, 6, 0, 2 * Math.PI);
                pen.fillStyle = COLOURS[index % COLOURS.length];
                pen.fill();
                pen.lineWidth = 2;
                pen.strokeStyle = "#fff";
                pen.stroke();
            }
        });
    }

    // The line under way: a path by hand, a lasso, or the next piece of a path of clicks.
    drawLine(pen, layout) {
        const {editor} = this;
        const colour = COLOURS[Math.max(0, editor.layerIndex) % COLOURS.length];
        let line = this.gesture?.line;
        pen.save();
        if (!line && this.open && this.cursor && editor.tool === "path") {
            line = [this.open.track[this.open.track.length - 1], this.cursor];
            pen.globalAlpha = 0.6;
            pen.setLineDash([5, 4]);
        }
        if (line) {
            const points = line.map(point => this.onScreen(point, layout));
            if (this.gesture?.closes) points.push(points[0]);
            drawPolyline(pen, points, colour, 2);
        }
        pen.restore();
    }

    drawBrush(pen, layout) {
        const {tool, brush} = this.editor;
        if (!this.cursor || (tool !== "brush" && tool !== "erase")) return;
        const {x, y} = this.onScreen(this.cursor, layout);
        for (const [colour, grow] of [["rgba(0, 0, 0, 0.8)", 1], ["#fff", 0]]) {
            pen.beginPath();
            pen.arc(x, y, Math.max(1, brush / 2 * layout.scale * layout.camera.zoom) + grow, 0, 2 * Math.PI);
            pen.strokeStyle = colour;
            pen.lineWidth = 1;
            pen.stroke();
        }
    }
}

function drawPolyline(pen, points, colour, width) {
    if (points.length < 2) return;
    pen.beginPath();
    pen.moveTo(points[0].x, points[0].y);
    for (const {x, y} of points.slice(1)) pen.lineTo(x, y);
    pen.lineWidth = width;
    pen.lineJoin = "round";
    pen.lineCap = "round";
    pen.strokeStyle = colour;
    pen.stroke();
}

function drawArrow(pen, points, colour) {
    const tip = points[points.length - 1];
    const from = points.findLast(point => Math.hypot(point.x - tip.x, point.y - tip.y) > 6);
    if (!from) return;
    const angle = Math.atan2(tip.y - from.y, tip.x - from.x);
    pen.save();
    pen.translate(tip.x, tip.y);
    pen.rotate(angle);
    pen.beginPath();
    pen.moveTo(13, 0);
    pen.lineTo(2, -6);
    pen.lineTo(2, 6);
    pen.closePath();
    pen.fillStyle = colour;
    pen.strokeStyle = "rgba(0, 0, 0, 0.65)";
    pen.lineWidth = 1;
    pen.fill();
    pen.stroke();
    pen.restore();
}

function dot(pen, point, radius, colour, ring) {
    pen.beginPath();
    pen.arc(point.x, point.y, radius, 0, 2 * Math.PI);
    pen.fillStyle = ring && colour !== "#fff" ? "#111" : colour;
    pen.fill();
    pen.lineWidth = ring ? 2.5 : 1;
    pen.strokeStyle = ring ? colour : "rgba(0, 0, 0, 0.8)";
    pen.stroke();
}

function drawPin(pen, point, colour, chosen) {
    pen.save();
    pen.translate(point.x, point.y);
    pen.rotate(Math.PI / 4);
    pen.beginPath();
    pen.rect(-5, -5, 10, 10);
    pen.fillStyle = chosen ? "#fff" : colour;
    pen.fill();
    pen.strokeStyle = "rgba(0, 0, 0, 0.8)";
    pen.lineWidth = 1.5;
    pen.stroke();
    pen.beginPath();
    pen.arc(0, 0, 1.8, 0, 2 * Math.PI);
    pen.fillStyle = "#111";
    pen.fill();
    pen.restore();
}
