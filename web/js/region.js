// Regions of layers as bitmaps: a polygon or runs to a mask of bytes, and back. Pure.

/** The mask (bytes, 1 inside) of a region drawn in `from` pixels ({width, height}), at a size. */
export function regionMask(region, from, width, height) {
    return region.polygon
        ? polygonMask(region.polygon, width / from.width, height / from.height, width, height)
        : runsMask(region, width, height);
}

// By winding number, as a canvas fills it, and pixel centres; scaled about the picture's corner,
// which lies at (-0.5, -0.5).
function polygonMask(polygon, sx, sy, width, height) {
    const mask = new Uint8Array(width * height);
    const points = polygon.map(([x, y]) => [(x + 0.5) * sx - 0.5, (y + 0.5) * sy - 0.5]);
    for (let y = 0; y < height; y += 1) {
        const crossings = [];
        for (let k = 0; k < points.length; k += 1) {
            const [x1, y1] = points[k], [x2, y2] = points[(k + 1) % points.length];
            if ((y1 <= y) !== (y2 <= y)) {
                crossings.push([x1 + (y - y1) * (x2 - x1) / (y2 - y1), y2 > y1 ? 1 : -1]);
            }
        }
        crossings.sort((a, b) => a[0] - b[0]);
        let winding = 0;
        for (let k = 0; k + 1 < crossings.length; k += 1) {
            winding += crossings[k][1];
            if (winding === 0) continue;
            const first = Math.max(0, Math.ceil(crossings[k][0]));
            const end = Math.min(width, Math.ceil(crossings[k + 1][0]));
            if (end > first) mask.fill(1, y * width + first, y * width + end);
        }
    }
    return mask;
}

function runsMask({runs, width: w, height: h}, width, height) {
    const own = new Uint8Array(w * h);
    let place = 0;
    runs.forEach((run, k) => {
        if (k % 2 === 1) own.fill(1, place, place + run);
        place += run;
    });
    if (w === width && h === height) return own;
    const mask = new Uint8Array(width * height);
    for (let y = 0; y < height; y += 1) {
        const row = Math.min(h - 1, Math.floor((y + 0.5) * h / height)) * w;
        for (let x = 0; x < width; x += 1) {
            mask[y * width + x] = own[row + Math.min(w - 1, Math.floor((x + 0.5) * w / width))];
        }
    }
    return mask;
}

/** A mask as a region of runs, alternating outside and inside; null where nothing is inside. */
export function regionOfMask(mask, width, height) {
    const runs = [];
    let inside = 0, length = 0;
    for (let k = 0; k < mask.length; k += 1) {
        if (mask[k] === inside) {
            length += 1;
            continue;
        }
        runs.push(length);
        inside = mask[k];
        length = 1;
    }
    if (runs.length === 0 && inside === 0) return null;
    runs.push(length);
    return {runs, width, height};
}

/** Paint a stroke of a round brush from one point to another into a mask (`value` 0 erases). */
export function paintStroke(mask, width, height, one, other, radius, value) {
    const left = Math.max(0, Math.floor(Math.min(one.x, other.x) - radius));
    const right = Math.min(width - 1, Math.ceil(Math.max(one.x, other.x) + radius));
    const top = Math.max(0, Math.floor(Math.min(one.y, other.y) - radius));
    const bottom = Math.min(height - 1, Math.ceil(Math.max(one.y, other.y) + radius));
    const dx = other.x - one.x, dy = other.y - one.y, square = dx * dx + dy * dy;
    for (let y = top; y <= bottom; y += 1) {
        for (let x = left; x <= right; x += 1) {
            const along = square ? ((x - one.x) * dx + (y - one.y) * dy) / square : 0;
            const part = Math.min(1, Math.max(0, along));
            const ex = x - one.x - part * dx, ey = y - one.y - part * dy;
            if (ex * ex + ey * ey <= radius * radius) mask[y * width + x] = value;
        }
    }
}
