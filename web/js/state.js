// What the editor edits: a motion as plain data, read from and written to one JSON string.
// Pure functions; each edit changes the motion that it is given.

import {STILL, timesOf} from "./geometry.js";

export const VERSION = 1;
export const MOVES = ["free", "rigid", "similarity", "affine"];
export const SPEEDS = ["linear", "ease", "ease_in", "ease_out", "hold"];
export const REPEATS = ["once", "loop", "ping_pong"];

/** A motion of that size in which nothing moves. */
export function emptyMotion({width, height, frames}) {
    return {version: VERSION, width, height, frames, layers: [], camera: []};
}

/** A layer that moves nothing yet, with a radius that fits the picture. */
export function newLayer(motion, name = nextName(motion)) {
    return {
        name, region: null, tracks: [], pins: [],
        radius: defaultRadius(motion.width, motion.height),
        move: "free", speed: "linear", repeat: "once", cycles: 1,
    };
}

function defaultRadius(width, height) {
    return Math.max(1, Math.round(Math.min(width, height) / 8));
}

function nextName(motion) {
    const taken = new Set(motion.layers.map(layer => layer.name));
    let number = 1;
    while (taken.has(`Layer ${number}`)) number += 1;
    return `Layer ${number}`;
}

/** Whether a motion moves nothing and shapes nothing, so that its size may be changed freely. */
export function isEmpty(motion) {
    return motion.camera.length === 0 && motion.layers.every(
        layer => !layer.region && layer.tracks.length === 0 && layer.pins.length === 0);
}

/**
 * The motion that a text holds; `size` ({width, height, frames}) counts where the text says none.
 *
 * Also reads lists of {x, y} points, as other editors write them, as tracks of one layer. Throws an
 * Error that says what was expected, for text that is neither.
 */
export function parseMotion(text, size) {
    if (text.trim() === "") return emptyMotion(size);
    let data;
    try {
        // As Python prints lists, with single quotes, does too.
        data = JSON.parse(text.includes('"') ? text : text.replaceAll("'", '"'));
    } catch (error) {
        throw new Error(`Expected a motion as JSON, got text that is none (${error.message}).`);
    }
    if (Array.isArray(data)) return fromTracks(data, size);
    if (data === null || typeof data !== "object" || !("layers" in data || "camera" in data)) {
        throw new Error("Expected a motion with layers, or lists of {x, y} points; got other JSON.");
    }
    if ((data.version ?? VERSION) !== VERSION) {
        throw new Error(`Expected a motion of version ${VERSION}, got version ${data.version}.`);
    }
    const whole = name => {
        const value = Math.round(number(data[name], size[name], name));
        if (value < 1) throw new Error(`${name}: expected 1 or more, got ${value}.`);
        return value;
    };
    const width = whole("width"), height = whole("height");
    return {
        version: VERSION, width, height, frames: whole("frames"),
        layers: list(data.layers, "layers").map(
            (layer, index) => readLayer(layer, index, defaultRadius(width, height))),
        camera: list(data.camera, "camera").map(readKey).sort((a, b) => a.t - b.t),
    };
}

function fromTracks(data, size) {
    const motion = emptyMotion(size);
    const tracks = data.length > 0 && data.every(Array.isArray) ? data : [data];
    const layer = newLayer(motion, "Tracks");
    layer.tracks = tracks.map(points => points.map(readPoint)).filter(track => track.length > 0);
    motion.layers.push(layer);
    return motion;
}

function readLayer(data, index, radius) {
    const where = `layers[${index}]`;
    if (data === null || typeof data !== "object") throw new Error(`${where}: expected a layer.`);
    return {
        name: String(data.name ?? `Layer ${index + 1}`),
        region: readRegion(data.region ?? null, where),
        tracks: list(data.tracks, `${where}.tracks`).map(
            points => list(points, `${where}.tracks`).map(readPoint)
        ).filter(track => track.length > 0),
        pins: list(data.pins, `${where}.pins`).map(readPoint).map(({x, y}) => ({x, y})),
        radius: Math.max(0.5, number(data.radius, radius, `${where}.radius`)),
        move: choice(data.move, MOVES, `${where}.move`),
        speed: choice(data.speed, SPEEDS, `${where}.speed`),
        repeat: choice(data.repeat, REPEATS, `${where}.repeat`),
        cycles: Math.max(1, number(data.cycles, 1, `${where}.cycles`)),
        ...(data.visible === false ? {visible: false} : {}),
    };
}

function readRegion(data, where) {
    if (data === null) return null;
    if (Array.isArray(data.polygon)) {
        return {polygon: data.polygon.map(([x, y]) => [
            number(x, undefined, `${where}.region`), number(y, undefined, `${where}.region`)])};
    }
    if (Array.isArray(data.runs)) {
        const {runs, width, height} = data;
        if (runs.reduce((sum, run) => sum + run, 0) !== width * height) {
            throw new Error(`${where}.region: expected runs that add up to width · height.`);
        }
        return {runs: [...runs], width, height};
    }
    throw new Error(`${where}.region: expected a polygon or runs.`);
}

function readPoint(data) {
    if (data === null || typeof data !== "object") {
        throw new Error(`Expected a point such as {"x": 40, "y": 64}, got ${JSON.stringify(data)}.`);
    }
    const point = {x: number(data.x, undefined, "x"), y: number(data.y, undefined, "y")};
    if (data.t !== undefined && data.t !== null) {
        point.t = Math.min(1, Math.max(0, number(data.t, 0, "t")));
    }
    return point;
}

function readKey(data) {
    const key = {t: Math.min(1, Math.max(0, number(data?.t, 0, "camera t")))};
    for (const name of Object.keys(STILL)) key[name] = number(data[name], STILL[name], name);
    return key;
}

function list(data, name) {
    if (data === undefined || data === null) return [];
    if (!Array.isArray(data)) throw new Error(`${name}: expected a list.`);
    return data;
}

function number(value, fallback, name) {
    const result = value ?? fallback;
    if (typeof result !== "number" || !Number.isFinite(result)) {
        throw new Error(`${name}: expected a number, got ${JSON.stringify(value)}.`);
    }
    return result;
}

function choice(value, known, name) {
    if (value === undefined || value === null) return known[0];
    if (!known.includes(value)) {
        throw new Error(`${name}: expected one of ${known.join(", ")}; got ${JSON.stringify(value)}.`);
    }
    return value;
}

/** A motion as compact JSON: lengths to a hundredth of a pixel, times to a ten-thousandth. */
export function writeMotion(motion) {
    return JSON.stringify(motion, (name, value) => {
        if (typeof value !== "number") return value;
        const digits = name === "t" || name === "zoom" ? 1e4 : 1e2;
        return Math.round(value * digits) / digits;
    });
}

/** Stretch a motion to another size, with everything in it. */
export function rescale(motion, width, height) {
    const sx = width / motion.width, sy = height / motion.height;
    const scaled = point => ({...point, x: (point.x + 0.5) * sx - 0.5, y: (point.y + 0.5) * sy - 0.5});
    for (const layer of motion.layers) {
        layer.tracks = layer.tracks.map(track => track.map(scaled));
        layer.pins = layer.pins.map(scaled);
        layer.radius *= Math.sqrt(sx * sy);
        if (layer.region?.polygon) {
            layer.region.polygon = layer.region.polygon.map(
                ([x, y]) => [(x + 0.5) * sx - 0.5, (y + 0.5) * sy - 0.5]);
        }
        // Runs are read at the size they state.
    }
    for (const key of motion.camera) {
        key.x *= sx;
        key.y *= sy;
    }
    motion.width = width;
    motion.height = height;
}

// --- paths

/** Give each point of a path the time at which a steady movement along it arrives. */
export function spreadTimes(track) {
    if (track.length < 3) {
        for (const point of track) delete point.t;
        return;
    }
    const lengths = [0];
    for (let k = 1; k < track.length; k += 1) {
        lengths.push(lengths[k - 1] + Math.hypot(
            track[k].x - track[k - 1].x, track[k].y - track[k - 1].y));
    }
    const whole = lengths[lengths.length - 1];
    track.forEach((point, k) => {
        point.t = whole > 0 ? lengths[k] / whole : k / (track.length - 1);
    });
}

/** Put a point into a path after point `after`; the movement's timing stays as it was. */
export function insertPoint(track, after, x, y) {
    const times = timesOf(track);
    const one = track[after], other = track[after + 1];
    const before = Math.hypot(x - one.x, y - one.y), behind = Math.hypot(x - other.x, y - other.y);
    const part = before + behind > 0 ? before / (before + behind) : 0.5;
    track.forEach((point, k) => { point.t = times[k]; });
    track.splice(after + 1, 0, {x, y, t: times[after] + (times[after + 1] - times[after]) * part});
}

/** Let a path go on to a new last point. */
export function extendTrack(track, x, y) {
    track.push({x, y});
    spreadTimes(track);
}

/** Take a point out of a path of several; the others keep their times. */
export function removePoint(track, index) {
    const times = timesOf(track);
    track.forEach((point, k) => { point.t = times[k]; });
    track.splice(index, 1);
    if (track.length === 1) delete track[0].t;
    else if (index === 0) track[0].t = 0;
    else if (index === track.length) track[index - 1].t = 1;
}

/** Set when a path arrives at a point; kept between its neighbours' times. */
export function setTime(track, index, time) {
    const times = timesOf(track);
    track.forEach((point, k) => { point.t = times[k]; });
    const least = index > 0 ? times[index - 1] + 0.001 : 0;
    const most = index < track.length - 1 ? times[index + 1] - 0.001 : 1;
    track[index].t = Math.min(most, Math.max(least, time));
}

/** The points that a hand-drawn line needs to stay within `tolerance` of itself. */
export function simplify(points, tolerance) {
    if (points.length < 3) return points.slice();
    const keep = new Set([0, points.length - 1]);
    const open = [[0, points.length - 1]];
    while (open.length > 0) {
        const [first, last] = open.pop();
        let farthest = -1, most = tolerance;
        for (let k = first + 1; k < last; k += 1) {
            const distance = distanceToSegment(points[k], points[first], points[last]).distance;
            if (distance > most) {
                most = distance;
                farthest = k;
            }
        }
        if (farthest < 0) continue;
        keep.add(farthest);
        open.push([first, farthest], [farthest, last]);
    }
    return points.filter((_, k) => keep.has(k));
}

/** How far a point is from the segment between two others, and how far along its foot lies. */
export function distanceToSegment(point, one, other) {
    const dx = other.x - one.x, dy = other.y - one.y;
    const square = dx * dx + dy * dy;
    const along = square > 0 ? ((point.x - one.x) * dx + (point.y - one.y) * dy) / square : 0;
    const part = Math.min(1, Math.max(0, along));
    return {
        distance: Math.hypot(point.x - one.x - part * dx, point.y - one.y - part * dy), part,
    };
}

// --- camera

/** Set some of the camera's values at the time `t`, on a keyframe there or a new one. */
export function setCamera(motion, t, now, values) {
    let key = motion.camera.find(other => Math.abs(other.t - t) < 1e-3);
    if (!key) {
        key = {t, ...now};
        motion.camera.push(key);
        motion.camera.sort((a, b) => a.t - b.t);
        if (motion.camera[0].t > 0) motion.camera.unshift({t: 0, ...STILL});
    }
    Object.assign(key, values);
}

/** Take the camera's keyframe at the time `t` away. */
export function removeKey(motion, t) {
    motion.camera = motion.camera.filter(key => Math.abs(key.t - t) >= 1e-3);
    if (motion.camera.every(key => key.t === 0)) motion.camera = [];
}

// --- undo

/** Steps of one text, to go back and forth in. */
export class History {
    constructor(text, limit = 200) {
        this.limit = limit;
        this.reset(text);
    }

    reset(text) {
        this.steps = [text];
        this.place = 0;
    }

    record(text) {
        if (text === this.steps[this.place]) return;
        this.steps.splice(this.place + 1, Infinity, text);
        if (this.steps.length > this.limit) this.steps.shift();
        this.place = this.steps.length - 1;
    }

    get canUndo() { return this.place > 0; }

    get canRedo() { return this.place < this.steps.length - 1; }

    /** The text one step back (-1) or forth (1), null at the end. */
    step(direction) {
        const place = this.place + direction;
        if (place < 0 || place >= this.steps.length) return null;
        this.place = place;
        return this.steps[place];
    }
}
