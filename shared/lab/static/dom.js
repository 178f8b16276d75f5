// Elements, and how the page takes on a new look without losing focus or scroll position.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Attributes that are null, undefined or false are left out. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value != null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** A button that does an action of the server, with what it takes. */
export function action(name, body, text, attributes = {}) {
  return el(
    "button",
    { "data-action": name, "data-body": JSON.stringify(body), ...attributes },
    text,
  );
}

/**
 * Make the children of `parent` look like `wanted`, with as few changes as possible: an element
 * that stays keeps its focus. Elements with `data-key` are recognised by it, others by their place.
 */
export function morph(parent, wanted) {
  const keys = new Set(wanted.map(keyOf));
  for (const child of [...parent.childNodes]) {
    if (keyOf(child) && !keys.has(keyOf(child))) child.remove();
  }
  let place = parent.firstChild;
  for (const next of wanted) {
    const key = keyOf(next);
    const current = key ? find(place, key) : place;
    if (current && isLike(current, next)) {
      if (current === place) place = place.nextSibling;
      else parent.insertBefore(current, place);
      update(current, next);
    } else {
      parent.insertBefore(next, place);
    }
  }
  while (place) {
    const following = place.nextSibling;
    place.remove();
    place = following;
  }
}

function keyOf(node) {
  return node.dataset?.key;
}

function find(node, key) {
  while (node && keyOf(node) !== key) node = node.nextSibling;
  return node;
}

function isLike(one, other) {
  return one.nodeName === other.nodeName && keyOf(one) === keyOf(other);
}

function update(current, next) {
  if (current.nodeType === Node.TEXT_NODE) {
    if (current.data !== next.data) current.data = next.data;
    return;
  }
  for (const name of current.getAttributeNames()) {
    if (!next.hasAttribute(name)) current.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (current.getAttribute(name) !== value) current.setAttribute(name, value);
  }
  morph(current, [...next.childNodes]);
}

/** Seconds for people. */
export function seconds(value) {
  if (value >= 7200) return `${Math.round(value / 3600)} h`;
  if (value >= 120) return `${Math.round(value / 60)} min`;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;
}

/** The time of day. */
export function clock(at) {
  return new Date(at * 1000).toTimeString().slice(0, 8);
}

/** A value of the database for people. */
export function text(value) {
  if (value == null) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** The class that has a worker's colour: A has the first, and the ninth has it again. */
export function colour(key) {
  const ordinal = [...key].reduce((sum, letter) => 26 * sum + letter.charCodeAt(0) - 64, 0) - 1;
  return `w${ordinal % 8}`;
}

/** The letter of a worker, in its colour. */
export function chip(key) {
  return key ? el("span", { class: `chip ${colour(key)}`, title: `worker ${key}` }, key) : null;
}
