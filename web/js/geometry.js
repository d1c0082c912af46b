// The maths of drawn motion, the same as in s2dm/flow/draw: when a path is where, how a layer
// follows its paths and pins, and what the camera does. Pure functions of plain data.
//
// Lengths are pixels of the picture, pixel centres at integers, y down. A time `u` runs from 0
// (frame 1) to 1 (the last of `frames`); a phase from 0 to 1 along a path.

const PIN = 1000; // how much more a pin counts than a path where both can't be had
const NEAR = 1e-6;
const LEAST = 1e-12; // paths that lie in one point turn nothing
const STEADY = 0.1; // without a region, how strongly surroundings keep from turning
const FIRM = 1; // how strongly they keep from being stretched
const CROWD = 0.1; // with a region, of the paths' variance: about fifteen paths stretch it by half

function eased(layer, time) {
    if (layer.speed === "ease") return time * time * (3 - 2 * time);
    if (layer.speed === "ease_in") return time * time;
    if (layer.speed === "ease_out") return time * (2 - time);
    return time;
}

// How many times a layer goes along its paths from u = 0 to 1. What repeats ends one frame before
// its first place, so that the clip can be played in a circle.
function runs(layer, frames) {
    if (layer.repeat === "once") return 1;
    return layer.cycles * (frames - 1) / frames * (layer.repeat === "ping_pong" ? 2 : 1);
}

/** How far along its paths a layer is at the time `u`. */
export function phaseAt(layer, u, frames) {
    const turns = u * runs(layer, frames);
    if (layer.repeat === "once") return eased(layer, turns);
    if (layer.repeat === "loop") return eased(layer, turns % 1);
    return eased(layer, 1 - Math.abs(1 - turns % 2));
}

/** The phase at the time `u` while a layer goes along its paths for the first time. */
export function firstPhaseAt(layer, u, frames) {
    return eased(layer, Math.min(1, u * runs(layer, frames)));
}

/** The time at which a layer first is at a phase of its paths. */
export function arrival(layer, phase, frames) {
    let low = 0, high = 1;
    for (let k = 0; k < 30; k += 1) {
        const middle = (low + high) / 2;
        if (eased(layer, middle) < phase) low = middle;
        else high = middle;
    }
    return low === 0 ? 0 : high / runs(layer, frames);
}

/** The times of a path's points: their own where they have one, else spread evenly between. */
export function timesOf(track) {
    const last = track.length - 1;
    const times = track.map(point => point.t);
    times[0] ??= 0;
    if (last > 0) times[last] ??= 1;
    for (let left = 0; left < last;) {
        let right = left + 1;
        while (times[right] === undefined) right += 1;
        for (let k = left + 1; k < right; k += 1) {
            times[k] = times[left] + (times[right] - times[left]) * (k - left) / (right - left);
        }
        left = right;
    }
    return times;
}

/** Where a path is at a phase; with the speed `hold` it jumps to each point at its time. */
export function pointAt(track, phase, hold = false) {
    const times = timesOf(track);
    const last = track.length - 1;
    if (phase <= times[0]) return {x: track[0].x, y: track[0].y};
    if (phase >= times[last]) return {x: track[last].x, y: track[last].y};
    let k = 0;
    while (times[k + 1] <= phase + (hold ? 1e-9 : 0)) k += 1;
    const part = hold ? 0 : (phase - times[k]) / (times[k + 1] - times[k]);
    return {
        x: track[k].x + (track[k + 1].x - track[k].x) * part,
        y: track[k].y + (track[k + 1].y - track[k].y) * part,
    };
}

/** A layer's paths, then its pins: where each is in frame 1 and at the time `u`. */
export function controlsAt(layer, u, frames) {
    const phase = phaseAt(layer, u, frames), start = phaseAt(layer, 0, frames);
    const hold = layer.speed === "hold";
    return [
        ...layer.tracks.map(track => ({
            from: pointAt(track, start, hold), to: pointAt(track, phase, hold),
        })),
        ...layer.pins.map(pin => ({from: pin, to: pin})),
    ];
}

/** Where the paths of a layer start. */
export function startsOf(layer) {
    return controlsAt(layer, 0, 1).slice(0, layer.tracks.length).map(({from}) => from);
}

/** How much of a layer without a region moves what is so far from its paths: 1 up to the radius,
then smoothly to 0 at twice as far. */
export function falloff(distance, radius) {
    const beyond = Math.min(1, Math.max(0, distance / radius - 1));
    return 1 - beyond * beyond * (3 - 2 * beyond);
}

/**
 * How a layer lies at the time `u`: a function from (x, y) of frame 1 to [x, y].
 *
 * One map for all of it, or ("free") bent between its paths and pins by moving least squares
 * (Schaefer, McPhail and Warren 2006). Without a region it fades out with the distance from its
 * paths.
 */
export function deformation(layer, u, frames) {
    const controls = controlsAt(layer, u, frames);
    const {region, radius, move} = layer;
    if (controls.length === 0 || !region && layer.tracks.length === 0) return (x, y) => [x, y];
    const bends = move === "free" && (controls.length > 1 || !region);
    const moved = bends
        ? bent(controls, region ? null : radius) : fitted(controls, layer.pins.length, move);
    if (region) return moved;
    const starts = controls.slice(0, layer.tracks.length).map(({from}) => from);
    return (x, y) => {
        let nearest = Infinity;
        for (const start of starts) nearest = Math.min(nearest, Math.hypot(x - start.x, y - start.y));
        const share = falloff(nearest, radius);
        if (share === 0) return [x, y];
        const [mx, my] = moved(x, y);
        return [x + share * (mx - x), y + share * (my - y)];
    };
}

// What every fit needs: weighted means of where paths and pins start (px, py) and where they are
// (qx, qy), and sums of products around them. Measured from the first of them, those that lie in one
// point are zero: what rounding would leave of them turns what is around.
function moments(controls, weights) {
    const first = controls[0];
    let sum = 0, px = 0, py = 0, qx = 0, qy = 0;
    for (let k = 0; k < controls.length; k += 1) {
        const {from, to} = controls[k], weight = weights[k];
        sum += weight;
        px += weight * (from.x - first.from.x);
        py += weight * (from.y - first.from.y);
        qx += weight * (to.x - first.to.x);
        qy += weight * (to.y - first.to.y);
    }
    px /= sum;
    py /= sum;
    qx /= sum;
    qy /= sum;
    let xx = 0, xy = 0, yy = 0, ax = 0, ay = 0, bx = 0, by = 0;
    for (let k = 0; k < controls.length; k += 1) {
        const {from, to} = controls[k], weight = weights[k];
        const fx = from.x - first.from.x - px, fy = from.y - first.from.y - py;
        const tx = to.x - first.to.x - qx, ty = to.y - first.to.y - qy;
        xx += weight * fx * fx;
        xy += weight * fx * fy;
        yy += weight * fy * fy;
        ax += weight * fx * tx;
        ay += weight * fx * ty;
        bx += weight * fy * tx;
        by += weight * fy * ty;
    }
    px += first.from.x;
    py += first.from.y;
    qx += first.to.x;
    qy += first.to.y;
    return {sum, px, py, qx, qy, xx, xy, yy, ax, ay, bx, by};
}

// The rigid, similar or affine map that fits best; with too few points the next simpler one.
function fitted(controls, pins, move) {
    const weights = controls.map((_, k) => (k < controls.length - pins ? 1 : PIN));
    const {sum, px, py, qx, qy, xx, xy, yy, ax, ay, bx, by} = moments(controls, weights);
    const cosine = ax + by, sine = ay - bx, spread = xx + yy;
    let linear = [1, 0, 0, 1];
    if (spread > 1e-6 * sum) {
        const length = move === "similarity" || move === "affine" ? spread : Math.hypot(cosine, sine);
        if (length > 1e-9 * spread) {
            linear = [cosine / length, -sine / length, sine / length, cosine / length];
        }
        const determinant = xx * yy - xy * xy;
        const smallest = (spread - Math.sqrt((xx - yy) ** 2 + 4 * xy * xy)) / 2;
        if (move === "affine" && smallest > 1e-6 * spread) {
            linear = [
                (ax * yy - bx * xy) / determinant, (bx * xx - ax * xy) / determinant,
                (ay * yy - by * xy) / determinant, (by * xx - ay * xy) / determinant,
            ];
        }
    }
    const [a, b, c, d] = linear;
    return (x, y) => [
        qx + a * (x - px) + b * (y - py), qy + c * (x - px) + d * (y - py)];
}

// Every point follows the map that fits best, near paths and pins more than far ones. It is rigid,
// and affine where they lie close together: against the radius, or all of them against one another.
function bent(controls, radius) {
    const weights = new Float64Array(controls.length);
    const all = moments(controls, weights.fill(1));
    const variance = (all.xx + all.yy) / all.sum;
    const firmness = FIRM / (radius === null ? Math.max(CROWD * variance, 1) : radius * radius);
    return (x, y) => {
        for (let k = 0; k < controls.length; k += 1) {
            const {from} = controls[k];
            const square = (from.x - x) ** 2 + (from.y - y) ** 2;
            // The fourth power, so that right around a path there is that path alone.
            weights[k] = 1 / (square + NEAR) ** 2;
            if (radius !== null) weights[k] *= falloff(Math.sqrt(square), radius);
        }
        let {sum, px, py, qx, qy, xx, xy, yy, ax, ay, bx, by} = moments(controls, weights);
        if (sum === 0) return [x, y];
        const steady = radius === null ? LEAST * sum : STEADY / (radius * radius);
        let cosine = steady + ax + by, sine = ay - bx;
        const length = Math.hypot(cosine, sine);
        if (length > 0) {
            cosine /= length;
            sine /= length;
        } else cosine = 1;
        const dx = x - px, dy = y - py;
        const firm = (firmness + 1e-6 * (xx + yy)) / 2;
        xx += firm;
        yy += firm;
        ax += firm * cosine;
        ay += firm * sine;
        bx -= firm * sine;
        by += firm * cosine;
        const determinant = xx * yy - xy * xy;
        const u = (dx * yy - dy * xy) / determinant, v = (dy * xx - dx * xy) / determinant;
        return [qx + u * ax + v * bx, qy + u * ay + v * by];
    };
}

export const STILL = Object.freeze({x: 0, y: 0, zoom: 1, roll: 0});

/** The camera at the time `u`; pan and roll go linearly, zoom by equal factors in equal times. */
export function cameraAt(keys, u) {
    if (keys.length === 0) return STILL;
    const all = keys[0].t > 0 ? [{t: 0, ...STILL}, ...keys] : keys;
    let k = 0;
    while (k < all.length - 1 && all[k + 1].t <= u) k += 1;
    const one = all[k], other = all[Math.min(k + 1, all.length - 1)];
    const part = other.t > one.t ? Math.max(0, u - one.t) / (other.t - one.t) : 0;
    const between = name => one[name] + (other[name] - one[name]) * part;
    return {
        x: between("x"), y: between("y"), roll: between("roll"),
        zoom: one.zoom * (other.zoom / one.zoom) ** part,
    };
}

/** Where the camera shows a point of the scene, in a picture of that size. */
export function throughCamera(camera, width, height) {
    const cx = (width - 1) / 2, cy = (height - 1) / 2;
    const angle = -camera.roll * Math.PI / 180;
    const a = camera.zoom * Math.cos(angle), b = camera.zoom * Math.sin(angle);
    return (x, y) => [
        cx + a * (x - cx) - b * (y - cy) - camera.x,
        cy + b * (x - cx) + a * (y - cy) - camera.y,
    ];
}
