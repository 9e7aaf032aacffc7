// How it is drawn: elements, maps, curves.

const TOP = 0.5; // the share at which the colours of the maps end
const TICKS = [0, 0.02, 0.1, TOP];
const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]; // between the lines of a chart

// Elements

const $ = (id) => document.getElementById(id);
const write = (id, text) => $(id).replaceChildren(...[text].flat());

function el(name, attributes = {}, ...children) {
  const isSvg = ["svg", "rect", "path", "g", "circle", "text", "line", "polyline"].includes(name);
  const node = isSvg
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(key, value === true ? "" : value);
  node.append(...children);
  return node;
}

const show = (node, isShown) => (node.hidden = !isShown);
const placeName = (patch) => `row ${Math.floor(patch / cols) + 1}, column ${(patch % cols) + 1}`;
const className = (index) => data.classes?.[index] ?? `class ${index}`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const list = (words) => words.join(", ").replace(/, ([^,]*)$/, " and $1");

// Writes a text of words.js: [text](file) is a link to a tutorial, *part:text* has a part's colour.
function prose(id, text) {
  const nodes = text.split(/(\[[^\]]+\]\([^)]+\)|\*[^*]+\*)/).map((piece) => {
    const [, label, file] = piece.match(/^\[(.+)\]\((.+)\)$/) ?? [];
    if (label) return el("a", { href: data.tutorials && `${data.tutorials}/${file}` }, label);
    const [, part, words] = piece.match(/^\*(.+?):(.+)\*$/) ?? [];
    return part ? el("b", { class: part }, words) : piece;
  });
  write(id, nodes);
  show($(id), text);
}

// A group of radio buttons, which the arrow keys go through.
function choices(id, items, chosen, choose) {
  const inputs = items.map(({ label, face, disabled }, i) => {
    const radio = { type: "radio", name: id, "aria-label": label, checked: i === chosen, disabled };
    const input = el("input", { ...radio, onchange: () => choose(i) });
    $(id).append(el("label", { class: "choice", title: label }, input, face));
    return input;
  });
  return (i) => (inputs[i].checked = true);
}

// Maps

const colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const kind of ["content", "position", "mixture"]) {
    const stops = [0, 1, 2].map((i) => {
      const hex = style.getPropertyValue(`--${kind}-${i}`).trim();
      return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    });
    colours[kind] = Array.from({ length: 256 }, (_, level) => {
      const [at, part] = level < 128 ? [0, level / 128] : [1, (level - 128) / 127];
      return stops[at].map((value, c) => Math.round(value + part * (stops[at + 1][c] - value)));
    });
  }
}

// The scale is that of square roots, so that little attention shows too.
function colour(share, kind) {
  return colours[kind][Math.round(255 * Math.sqrt(Math.min(share / TOP, 1)))];
}

function paint(canvas, width, height, rgb) {
  Object.assign(canvas, { width, height });
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set([...rgb(i), 255], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function paintPicture(canvas, { pixels }) {
  const [height, width] = data.size;
  const values = bytes(pixels);
  const channel = (c) => (data.mean.length >= 3 ? c * width * height : 0);
  paint(canvas, width, height, (i) => [0, 1, 2].map((c) => values[channel(c) + i]));
}

function newMap(node) {
  node.style.aspectRatio = `${data.size[1]} / ${data.size[0]}`;
  const marks = el("svg", { viewBox: `0 0 ${cols} ${rows}`, preserveAspectRatio: "none" });
  node.replaceChildren(el("canvas"), marks);
  return node;
}

function frame(kind, patch) {
  const whole = { x: 0, y: 0, width: cols, height: rows };
  const one = { x: patch % cols, y: Math.floor(patch / cols), width: 1, height: 1 };
  const place = patch === null ? whole : one;
  return ["under", kind].map((name) => el("rect", { class: `frame ${name}`, ...place }));
}

function marksOf(asked) {
  const marks = asked === null ? [] : frame("query", asked);
  return state.key === null ? marks : [...marks, ...frame("key", state.key)];
}

function drawMap(node, shares, kind, asked, centre) {
  paint(node.querySelector("canvas"), cols, rows, (i) => colour(shares[i], kind));
  const marks = marksOf(asked);
  if (centre && asked !== null) {
    const [x, y] = [(asked % cols) + 0.5 + centre[0], Math.floor(asked / cols) + 0.5 + centre[1]];
    const arm = cols / 20;
    const d = `M${x - arm} ${y}H${x + arm}M${x} ${y - arm}V${y + arm}`;
    if (x > 0 && x < cols && y > 0 && y < rows)
      marks.push(...["under", "query"].map((name) => el("path", { class: `cross ${name}`, d })));
  }
  node.querySelector("svg").replaceChildren(...marks);
  const most = shares.indexOf(Math.max(...shares));
  node.setAttribute(
    "aria-label",
    `${node.dataset.name}: most, ${shares[most].toFixed(3)}, at ${placeName(most)}`,
  );
}

// The patch below a pointer.
function patchAt(node, event) {
  const box = node.getBoundingClientRect();
  const part = (at, start, size, count) =>
    Math.min(count - 1, Math.max(0, Math.floor(((at - start) / size) * count)));
  const row = part(event.clientY, box.top, box.height, rows);
  return row * cols + part(event.clientX, box.left, box.width, cols);
}

// A map on which the pointer reads the share of a patch.
function readable(name) {
  const read = (event) => update({ key: patchAt(node, event) });
  const handlers = {
    onpointermove: read,
    onpointerdown: read,
    onpointerleave: () => update({ key: null }),
  };
  const node = newMap(
    el("div", { class: "map heads-map", role: "img", "data-name": name, ...handlers }),
  );
  return node;
}

// Curves

const lineColour = (i, count) =>
  `color-mix(in oklch, var(--last-line) ${(100 * i) / Math.max(count - 1, 1)}%, var(--first-line))`;

// Curves over the epochs, with their values at the chosen one; even: a dotted line, and zero is shown.
function drawChart(node, lines, even) {
  const { epochs } = data.history;
  const [width, height, left, bottom] = [Math.max(node.clientWidth, 240), 210, 40, 24];
  const all = lines.flatMap(({ values }) => values);
  const [least, most] = [even === null ? Math.min(...all) : 0, Math.max(...all, even ?? -Infinity)];
  const step = STEPS.find((size) => (most - least) / size <= 5) ?? (most - least) / 4;
  const low = Math.floor(least / step) * step;
  const high = (Math.floor(most / step) + 1) * step;
  const x = (i) => left + ((width - left - 12) * i) / Math.max(epochs.length - 1, 1);
  const y = (value) => height - bottom - ((height - bottom - 10) * (value - low)) / (high - low);
  const svg = el("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": "curves; the values follow",
  });
  for (let tick = low; tick < high + step / 2; tick += step)
    svg.append(
      el("line", { class: "axis", x1: left, x2: width - 12, y1: y(tick), y2: y(tick) }),
      el(
        "text",
        { x: left - 6, y: y(tick) + 4, "text-anchor": "end" },
        `${Number(tick.toFixed(3))}`,
      ),
    );
  const apart = Math.ceil(epochs.length / Math.floor(width / 60));
  epochs.forEach((epoch, i) => {
    if (i % apart === 0)
      svg.append(el("text", { x: x(i), y: height - 6, "text-anchor": "middle" }, `${epoch}`));
  });
  if (even !== null)
    svg.append(el("line", { class: "even", x1: left, x2: width - 12, y1: y(even), y2: y(even) }));
  lines.forEach(({ values, faint }, i) => {
    const points = values.map((value, at) => `${x(at)},${y(value)}`).join(" ");
    svg.append(
      el("polyline", {
        points,
        class: faint ? "faint" : "",
        style: `stroke:${lineColour(i, lines.length)}`,
      }),
    );
  });
  svg.append(
    el("line", {
      class: "cursor",
      x1: x(state.epoch),
      x2: x(state.epoch),
      y1: 6,
      y2: height - bottom,
    }),
  );
  const values = lines.map(({ name, values }, i) =>
    el(
      "li",
      {},
      el("i", { style: `background:${lineColour(i, lines.length)}` }),
      `${name} ${values[state.epoch].toFixed(3)}`,
    ),
  );
  node.className = "chart";
  node.replaceChildren(svg, el("ul", { class: "values" }, ...values));
}
