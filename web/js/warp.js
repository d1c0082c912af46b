// The preview: the picture moved by the motion, drawn on the processor. A graphics card that is
// sampling would stutter, browsers allow few WebGL contexts, and a preview of 200,000 pixels
// takes a few milliseconds this way.
//
// Each pixel belongs to the front layer whose region holds it, or to the background. Layers are
// meshes that carry their own pixels, drawn from back to front; what nothing reaches stays clear.

import {STILL, cameraAt, deformation, startsOf, throughCamera} from "./geometry.js";
import {regionMask} from "./region.js";

const CELLS = 40; // along the longer side of the picture

export class Warp {
    constructor() {
        this.source = null;
        this.masks = new WeakMap();
        this.ownedFor = null;
    }

    /** Take a picture: RGBA pixels in an ImageData. */
    setPicture(image) {
        this.width = image.width;
        this.height = image.height;
        this.source = new Int32Array(image.data.buffer.slice(0));
        this.cell = Math.max(4, Math.ceil(Math.max(image.width, image.height) / CELLS));
        this.masks = new WeakMap();
        this.ownedFor = null;
    }

    /** The picture at the time `u` of a motion, as an ImageData of that size. */
    render(motion, u, width, height) {
        if (this.output?.width !== width || this.output?.height !== height) {
            this.output = new ImageData(width, height);
        }
        const target = {
            pixels: new Int32Array(this.output.data.buffer), width, height,
            source: this.source, sourceWidth: this.width, sourceHeight: this.height,
        };
        target.pixels.fill(0);
        this.findOwners(motion);
        const camera = cameraAt(motion.camera, u);
        this.drawBackground(target, motion, camera);
        const shown = throughCamera(camera, motion.width, motion.height);
        this.layers.forEach((layer, k) => this.drawLayer(target, motion, layer, k + 1, u, shown));
        return this.output;
    }

    // Which layer each pixel of the picture belongs to (0: the background), and which cells of the
    // mesh each layer needs. Kept until a layer's region, start or order changes.
    findOwners(motion) {
        this.layers = motion.layers.filter(layer => layer.visible !== false);
        const {width, height} = this;
        const wanted = [motion.width, motion.height, ...this.layers.flatMap(layer => (
            layer.region ? [layer.region]
                : [layer.radius, ...startsOf(layer).flatMap(({x, y}) => [x, y])]
        ))];
        if (this.ownedFor?.length === wanted.length
            && wanted.every((value, k) => value === this.ownedFor[k])) return;
        this.ownedFor = wanted;
        const owners = this.owners = new Uint8Array(width * height);
        this.layers.forEach((layer, k) => {
            if (!layer.region) {
                this.ownAround(startsOf(layer), 2 * layer.radius, motion, k + 1);
                return;
            }
            const mask = this.maskOf(layer.region, motion);
            for (let i = 0; i < mask.length; i += 1) if (mask[i]) owners[i] = k + 1;
        });
        const across = Math.ceil(width / this.cell), down = Math.ceil(height / this.cell);
        this.across = across;
        this.cells = this.layers.map(() => new Uint8Array(across * down));
        for (let y = 0; y < height; y += 1) {
            const row = Math.floor(y / this.cell) * across;
            for (let x = 0; x < width; x += 1) {
                const owner = owners[y * width + x];
                if (owner) this.cells[owner - 1][row + Math.floor(x / this.cell)] = 1;
            }
        }
    }

    maskOf(region, motion) {
        let mask = this.masks.get(region);
        if (!mask) {
            mask = regionMask(region, motion, this.width, this.height);
            this.masks.set(region, mask);
        }
        return mask;
    }

    // Around paths, whole cells of the mesh: the outermost of their corners don't move, so that the
    // layer joins what is around it.
    ownAround(places, radius, motion, owner) {
        const {width, height, owners, cell} = this;
        const sx = motion.width / width, sy = motion.height / height;
        for (let top = 0; top < height; top += cell) {
            const bottom = Math.min(height, top + cell);
            for (let left = 0; left < width; left += cell) {
                const touched = places.some(({x, y}) => {
                    const px = (x + 0.5) / sx, py = (y + 0.5) / sy;
                    const dx = px - Math.min(left + cell, Math.max(left, px));
                    const dy = py - Math.min(top + cell, Math.max(top, py));
                    return Math.hypot(dx * sx, dy * sy) < radius;
                });
                if (!touched) continue;
                const right = Math.min(width, left + cell);
                for (let y = top; y < bottom; y += 1) {
                    owners.fill(owner, y * width + left, y * width + right);
                }
            }
        }
    }

    // The camera's map is affine: each pixel asks back where it was.
    drawBackground(target, motion, camera) {
        const {owners} = this;
        const {pixels, width, height, source, sourceWidth, sourceHeight} = target;
        const mx = motion.width / width, my = motion.height / height;
        const sx = this.width / motion.width, sy = this.height / motion.height;
        const cx = (motion.width - 1) / 2, cy = (motion.height - 1) / 2;
        const angle = camera.roll * Math.PI / 180;
        const cosine = Math.cos(angle) / camera.zoom, sine = Math.sin(angle) / camera.zoom;
        const still = Object.keys(STILL).every(name => camera[name] === STILL[name]);
        if (still && width === sourceWidth && height === sourceHeight) {
            for (let i = 0; i < pixels.length; i += 1) if (!owners[i]) pixels[i] = source[i];
            return;
        }
        for (let y = 0; y < height; y += 1) {
            for (let x = 0; x < width; x += 1) {
                const dx = (x + 0.5) * mx - 0.5 + camera.x - cx;
                const dy = (y + 0.5) * my - 0.5 + camera.y - cy;
                const u = (cx + cosine * dx - sine * dy + 0.5) * sx - 0.5;
                const v = (cy + sine * dx + cosine * dy + 0.5) * sy - 0.5;
                if (u < -0.5 || v < -0.5) continue;
                const nx = (u + 0.5) | 0, ny = (v + 0.5) | 0;
                if (nx >= sourceWidth || ny >= sourceHeight) continue;
                if (owners[ny * sourceWidth + nx]) continue;
                pixels[y * width + x] = sample(source, sourceWidth, sourceHeight, u, v);
            }
        }
    }

    drawLayer(target, motion, layer, owner, u, shown) {
        const move = deformation(layer, u, motion.frames);
        const {cell, across} = this;
        const cells = this.cells[owner - 1];
        const sx = motion.width / this.width, sy = motion.height / this.height;
        const ox = target.width / motion.width, oy = target.height / motion.height;
        const vertices = new Map();
        const vertex = (column, row) => {
            const key = row * (across + 1) + column;
            let found = vertices.get(key);
            if (!found) {
                const px = column * cell - 0.5, py = row * cell - 0.5;
                const moved = move((px + 0.5) * sx - 0.5, (py + 0.5) * sy - 0.5);
                const [x, y] = shown(moved[0], moved[1]);
                found = [(x + 0.5) * ox - 0.5, (y + 0.5) * oy - 0.5, px, py];
                vertices.set(key, found);
            }
            return found;
        };
        for (let k = 0; k < cells.length; k += 1) {
            if (!cells[k]) continue;
            const column = k % across, row = (k - column) / across;
            const one = vertex(column, row), two = vertex(column + 1, row);
            const three = vertex(column, row + 1), four = vertex(column + 1, row + 1);
            drawTriangle(target, this.owners, owner, one, two, three);
            drawTriangle(target, this.owners, owner, two, four, three);
        }
    }
}

function drawTriangle(target, owners, owner, a, b, c) {
    const {pixels, width, height, source, sourceWidth, sourceHeight} = target;
    const [ax, ay, au, av] = a, [bx, by, bu, bv] = b, [cx, cy, cu, cv] = c;
    const area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay);
    if (!(Math.abs(area) > 1e-9)) return;
    const ux = ((bu - au) * (cy - ay) - (cu - au) * (by - ay)) / area;
    const uy = ((cu - au) * (bx - ax) - (bu - au) * (cx - ax)) / area;
    const vx = ((bv - av) * (cy - ay) - (cv - av) * (by - ay)) / area;
    const vy = ((cv - av) * (bx - ax) - (bv - av) * (cx - ax)) / area;
    const edges = [edge(a, b), edge(b, c), edge(c, a)];
    const top = Math.max(0, Math.ceil(Math.min(ay, by, cy)));
    const end = Math.min(height, Math.ceil(Math.max(ay, by, cy)));
    for (let y = top; y < end; y += 1) {
        let left = Infinity, right = -Infinity;
        for (let k = 0; k < 3; k += 1) {
            const [x1, y1, x2, y2] = edges[k];
            if ((y1 <= y) === (y2 <= y)) continue;
            const x = x1 + (y - y1) * (x2 - x1) / (y2 - y1);
            if (x < left) left = x;
            if (x > right) right = x;
        }
        const first = Math.max(0, Math.ceil(left)), last = Math.min(width, Math.ceil(right));
        let u = au + (first - ax) * ux + (y - ay) * uy, v = av + (first - ax) * vx + (y - ay) * vy;
        for (let x = first; x < last; x += 1) {
            if (u >= -0.5 && v >= -0.5) {
                const nx = (u + 0.5) | 0, ny = (v + 0.5) | 0;
                if (nx < sourceWidth && ny < sourceHeight
                    && owners[ny * sourceWidth + nx] === owner) {
                    pixels[y * width + x] = sample(source, sourceWidth, sourceHeight, u, v);
                }
            }
            u += ux;
            v += vx;
        }
    }
}

// The same numbers for both triangles at an edge, so that no pixel falls between them.
function edge(one, other) {
    const down = one[1] < other[1] || one[1] === other[1] && one[0] < other[0];
    return down ? [one[0], one[1], other[0], other[1]] : [other[0], other[1], one[0], one[1]];
}

// Bilinear, on packed bytes and in whole numbers, with weights of 1/256.
function sample(source, width, height, u, v) {
    const x = (Math.min(Math.max(u, 0), width - 1.004) * 256) | 0;
    const y = (Math.min(Math.max(v, 0), height - 1.004) * 256) | 0;
    const fx = x & 255, fy = y & 255;
    const at = Math.imul(y >> 8, width) + (x >> 8) | 0;
    const a = source[at], b = source[at + 1], c = source[at + width], d = source[at + width + 1];
    const wd = Math.imul(fx, fy) >> 8, wb = fx - wd | 0, wc = fy - wd | 0;
    const wa = 256 - fx - wc | 0;
    const even = Math.imul(a & 0xff00ff, wa) + Math.imul(b & 0xff00ff, wb)
        + Math.imul(c & 0xff00ff, wc) + Math.imul(d & 0xff00ff, wd) | 0;
    const odd = Math.imul(a >>> 8 & 0xff00ff, wa) + Math.imul(b >>> 8 & 0xff00ff, wb)
        + Math.imul(c >>> 8 & 0xff00ff, wc) + Math.imul(d >>> 8 & 0xff00ff, wd) | 0;
    return even >>> 8 & 0xff00ff | odd & 0xff00ff00;
}
