// Elements, made without HTML text.

/** An element with attributes, listeners (`on…`) and children (elements or plain text). */
export function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
        else if (value === true) element.setAttribute(name, "");
        else if (value !== false && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
}

const ICONS = {
    select: "M3 2l9 6-4 .8L6.2 13z",
    path: "M3 13C3 6 13 10 13 3M11 3a2 2 0 1 0 4 0 2 2 0 1 0-4 0M1 13a2 2 0 1 0 4 0 2 2 0 1 0-4 0",
    pin: "M8 15V9M5 2h6M6 2v4L4 9h8l-2-3V2",
    brush: "M14 2L7 9M6 8.500c-2 0-3 1.500-3 3 0 1-.5 2-1.500 2.500 3 .5 6-.5 6-3.500z",
    erase: "M6 13h8M2.500 10.500l7-7 4 4-5.500 5.500H5zM6 7l4 4",
    lasso: "M8 3c3.500 0 6 1.800 6 4s-2.500 4-6 4-6-1.800-6-4 2.500-4 6-4M4.500 10.500c-1 1 .5 2 0 4",
    undo: "M5 3L2 6l3 3M2 6h7a4 4 0 0 1 0 8H6",
    redo: "M11 3l3 3-3 3M14 6H7a4 4 0 0 0 0 8h3",
    fit: "M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4",
    json: "M6 2C3 2 5 7 2.500 8 5 9 3 14 6 14M10 2c3 0 1 5 3.500 6C11 9 13 14 10 14",
    picture: "M2 3h12v10H2zM2 11l4-4 3 3 2-2 3 3M10.500 6h.01",
    play: "M4 2.500v11l9-5.500z",
    pause: "M5 3v10M11 3v10",
    first: "M4 3v10M12 3L6 8l6 5z",
    add: "M8 3v10M3 8h10",
    remove: "M3 4h10M6 4V2.500h4V4M4.500 4l.5 9.500h6l.5-9.500M7 7v4M9 7v4",
    copy: "M5.500 5.500h8v8h-8zM10.500 5.500v-3h-8v8h3",
    up: "M8 13V3M4 7l4-4 4 4",
    down: "M8 3v10M4 9l4 4 4-4",
    seen: "M1 8c3-5 11-5 14 0-3 5-11 5-14 0M6 8a2 2 0 1 0 4 0 2 2 0 1 0-4 0",
    unseen: "M1 8c3-5 11-5 14 0-3 5-11 5-14 0M2 14L14 2",
    key: "M8 2l6 6-6 6-6-6z",
    close: "M3 3l10 10M13 3L3 13",
    even: "M2 8h12M2 6v4M6 6v4M10 6v4M14 6v4",
};
const FILLED = new Set(["select", "play"]);

/** One of the editor's icons. */
export function icon(name) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", "0 0 16 16");
    svg.setAttribute("aria-hidden", "true");
    if (FILLED.has(name)) svg.classList.add("s2dm-filled");
    const path = document.createElementNS(space, "path");
    path.setAttribute("d", ICONS[name]);
    svg.append(path);
    return svg;
}

/** A button with an icon, its name as title and for screen readers. */
export function iconButton(name, title, onclick, attributes = {}) {
    return make(
        "button", {type: "button", class: "s2dm-button", title, "aria-label": title, onclick,
            ...attributes}, icon(name));
}

/** Show another icon and title on such a button. */
export function relabel(button, name, title) {
    if (button.title === title) return;
    button.replaceChildren(icon(name));
    button.title = title;
    button.setAttribute("aria-label", title);
}

/** Set properties of an element that are not so already; a change that is none costs layout. */
export function assign(element, properties) {
    for (const [name, value] of Object.entries(properties)) {
        if (element[name] !== value) element[name] = value;
    }
}

/** Set an attribute of an element if it is not so already. */
export function setAttribute(element, name, value) {
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}
