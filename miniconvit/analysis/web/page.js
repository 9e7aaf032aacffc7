// The page: its state, what is drawn from it, and what changes it.

const TOP = 0.5; // the share at which the colours of the maps end
const TICKS = [0, 0.02, 0.1, TOP];
const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]; // between the lines of a chart
const LOCALITY = 4; // the largest factor of a locality strength

const data = JSON.parse(document.getElementById("data").textContent);
const [rows, cols] = data.grid;
const depth = data.layers.length;
const params = data.params && readParams(data.params);
const hasToken = (layer) => layer >= data.classTokenJoins;
const lastLayer = depth - 1;

const trained = () => ({
  gates: data.layers.map(({ gate }) => gate && [...gate]),
  factors: data.layers.map(() => Array(data.heads).fill(1)),
});
const firstLook = data.layers.findLastIndex(({ kind }, i) => isHeld(i) && kind !== "mhsa");
const state = {
  image: 0,
  layer: firstLook < 0 ? lastLayer : firstLook,
  patch: Math.floor(rows / 2) * cols + Math.floor(cols / 2), // the one that was clicked
  hovered: null, // the patch below the pointer, which asks in its place
  tokenAsks: false,
  key: null, // the patch whose share is read
  over: "none",
  knobs: trained(),
  epoch: data.history ? data.history.epochs.length - 1 : 0,
};

// Numbers

function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

function rowsOf(numbers, count) {
  const size = numbers.length / count;
  return Array.from({ length: count }, (_, i) => numbers.subarray(i * size, (i + 1) * size));
}

// Parameters by name: vectors, and matrices as lists of rows.
function readParams({ shapes, numbers }) {
  const all = Float64Array.from(new Float32Array(bytes(numbers).buffer));
  let start = 0;
  return Object.fromEntries(
    shapes.map(([name, shape]) => {
      const size = shape.reduce((a, b) => a * b, 1);
      const values = all.subarray(start, (start += size));
      const [count] = shape.length === 3 ? shape.slice(1) : shape; // (1, N, D) has N rows
      return [name, shape.length === 1 ? values : rowsOf(values, count)];
    }),
  );
}

// Whether the page knows q and k of a layer.
function isHeld(layer) {
  return data.params !== null || layer in data.images[0].qk;
}

// {layers: q and k of each head, logits or null} of the image, as the knobs are set. It is computed
// anew when one of them changes.
function look() {
  const image = data.images[state.image];
  const key = JSON.stringify([state.image, params && state.knobs]);
  if (look.key !== key) {
    look.key = key;
    look.result = params
      ? convit(bytes(image.pixels), data, params, state.knobs)
      : { layers: data.layers.map((_, i) => i in image.qk && storedHeads(image.qk[i])), logits: null };
  }
  return look.result;
}

function storedHeads(base64) {
  const numbers = Float64Array.from(new Float32Array(bytes(base64).buffer));
  const [q, k] = rowsOf(numbers, 2).map((part) => rowsOf(part, data.heads));
  const tokens = (layer) => rows * cols + layer;
  const M = q[0].length % tokens(0) ? tokens(1) : tokens(0);
  return q.map((_, h) => ({ q: rowsOf(q[h], M), k: rowsOf(k[h], M) }));
}

// {content, position, mixture} of a token of the image: what the page shows and the tests compare.
function mapsOf(layer, head, query) {
  return attend(headWith(data, layer, head, look().layers[layer][head], state.knobs), query);
}

// The shares of the patches among those of all tokens.
const patchesOf = (shares, layer) => (hasToken(layer) ? shares.slice(1) : shares);

function probabilities() {
  const { logits } = look();
  return logits ? softmax([...logits]) : data.images[state.image].probabilities;
}

// The patch that asks, or null where it is the class token; and its place among the tokens.
const asks = () => state.hovered ?? (state.tokenAsks ? null : state.patch);
const query = () => (asks() === null ? 0 : asks() + (hasToken(state.layer) ? 1 : 0));

// (right, down) of a head's centre, or null where it is pushed away on all sides.
function centreOf(layer, head) {
  const w = data.layers[layer].position?.[head];
  return w && w[2] < 0 ? [w[0] / (-2 * w[2]), w[1] / (-2 * w[2])] : null;
}

// Mean distance in patches from a patch to what it looks at.
function reach(shares, from) {
  const place = (patch) => [Math.floor(patch / cols), patch % cols];
  const [row, col] = place(from);
  const far = shares.map((share, i) => share * Math.hypot(place(i)[0] - row, place(i)[1] - col));
  return far.reduce((a, b) => a + b) / shares.reduce((a, b) => a + b);
}

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
    else if (value !== false && value !== null) node.setAttribute(key, value === true ? "" : value);
  node.append(...children);
  return node;
}

const show = (node, isShown) => (node.hidden = !isShown);
const placeName = (patch) => `row ${Math.floor(patch / cols) + 1}, column ${(patch % cols) + 1}`;
const className = (index) => data.classes?.[index] ?? `class ${index}`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const list = (words) => words.join(", ").replace(/, ([^,]*)$/, " and $1");

function layerNames(kind) {
  const numbers = data.layers.flatMap((layer, i) => (layer.kind === kind ? [i + 1] : []));
  const range = numbers.length > 2 ? `${numbers[0]} to ${numbers.at(-1)}` : list(numbers);
  return numbers.length && `${numbers.length > 1 ? "layers" : "layer"} ${range}`;
}

function tutorial(file, text) {
  return el("a", { href: data.tutorials && `${data.tutorials}/${file}` }, text);
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
  node.setAttribute("aria-label", `${node.dataset.name}: most, ${shares[most].toFixed(3)}, at ${placeName(most)}`);
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
  const handlers = { onpointermove: read, onpointerdown: read, onpointerleave: () => update({ key: null }) };
  const node = newMap(el("div", { class: "map heads-map", role: "img", "data-name": name, ...handlers }));
  return node;
}

// The image

function drawPicture() {
  const node = $("picture");
  paintPicture(node.querySelector("canvas"), data.images[state.image]);
  node.classList.toggle("smooth", data.size[1] > 128);
  const lines = Array.from({ length: cols - 1 }, (_, i) => `M${i + 1} 0V${rows}`);
  lines.push(...Array.from({ length: rows - 1 }, (_, i) => `M0 ${i + 1}H${cols}`));
  const marks = [...veil(), el("path", { class: "net", d: lines.join("") })];
  const asked = asks();
  marks.push(...frame("query", asked), ...(state.key === null ? [] : frame("key", state.key)));
  node.querySelector("svg").replaceChildren(...marks);
  const who = asked === null ? "The class token" : `The patch in ${placeName(asked)}`;
  const read = state.key === null ? "" : ` It gives to ${placeName(state.key)} the shares below the maps.`;
  write("query", `${who} asks.${read}`);
  const size = `${rows} rows and ${cols} columns of patches`;
  node.setAttribute("aria-label", `Image ${data.images[state.image].name}, ${size}. ${who} asks.`);
}

function veil() {
  if (state.over === "none") return [];
  const heads = state.over === "mean" ? [...Array(data.heads).keys()] : [Number(state.over)];
  const maps = heads.map((h) => patchesOf(mapsOf(state.layer, h, query()).mixture, state.layer));
  const shares = maps[0].map((_, i) => maps.reduce((sum, map) => sum + map[i], 0));
  const most = Math.max(...shares);
  return shares.map((share, i) => {
    const place = { x: i % cols, y: Math.floor(i / cols), width: 1, height: 1 };
    return el("rect", { class: "veil", ...place, opacity: 0.86 * (1 - Math.sqrt(share / most)) });
  });
}

// The heads of a layer

let cards = [];

function buildHeads() {
  const { kind } = data.layers[state.layer];
  $("heads").classList.toggle("single", kind === "mhsa");
  cards = Array.from({ length: data.heads }, (_, h) => newCard(h, kind));
  $("heads").replaceChildren(...cards.map(({ node }) => node));
  $("heads").style.setProperty("--columns", Math.ceil(Math.sqrt(data.heads)));
}

function newCard(h, kind) {
  const name = `Head ${h + 1}`;
  const kinds = kind === "mhsa" ? ["content"] : ["content", "position", "mixture"];
  const signs = kind === "gpsa" ? ["+", "="] : ["×", "→"];
  const card = { maps: {}, values: {}, far: el("output") };
  const lines = [[], [], []];
  kinds.forEach((part, i) => {
    card.maps[part] = readable(`${part} of ${name.toLowerCase()}`);
    card.values[part] = el("output");
    const parts = [el("small", { class: part }, part), card.maps[part], card.values[part]];
    parts.forEach((node, line) => {
      if (i) lines[line].push(el("span", { class: "sign", "aria-hidden": "true" }, line === 1 ? signs[i - 1] : ""));
      lines[line].push(node);
    });
  });
  card.node = el("article", { class: "head", "aria-label": name },
    el("header", {}, el("h3", {}, name), card.far),
    el("div", { class: kinds.length > 1 ? "maps" : "maps one" }, ...lines.flat()));
  if (hasToken(state.layer)) {
    card.swatch = el("span", { class: "swatch" });
    card.token = el("output");
    card.node.append(el("div", { class: "class-token" }, card.swatch, card.token));
  }
  if (kind === "gpsa")
    card.gate = newSlider(card.node, `gate of ${name.toLowerCase()}`, "gate", 1, 0.01, (value) => {
      state.knobs.gates[state.layer][h] = value;
    });
  if (kind !== "mhsa") {
    card.factor = newSlider(card.node, `locality strength of ${name.toLowerCase()}`, "strength", LOCALITY, 0.05, (value) => {
      state.knobs.factors[state.layer][h] = value;
    });
    card.node.append(el("div", { class: "centre" }, centreText(h)));
  }
  return card;
}

function newSlider(node, name, kind, max, step, set) {
  const oninput = (event) => {
    set(Number(event.target.value));
    update();
  };
  const attributes = { type: "range", class: kind, min: 0, max, step, "aria-label": name };
  const slider = { input: el("input", { ...attributes, oninput }), text: el("span") };
  node.append(el("label", { class: "slider" }, slider.text, slider.input));
  return slider;
}

function setSlider({ input, text }, value, words) {
  input.value = value;
  input.setAttribute("aria-valuetext", words);
  text.textContent = words;
}

function centreText(h) {
  const centre = centreOf(state.layer, h);
  if (!centre) return "no centre: this head is pushed away on all sides";
  const [right, down] = centre;
  const across = `${Math.abs(right).toFixed(2)} ${right < 0 ? "left" : "right"}`;
  return `centre ${across}, ${Math.abs(down).toFixed(2)} ${down < 0 ? "up" : "down"} (in patches)`;
}

function drawHeads() {
  const { layer, knobs } = state;
  const { kind, position } = data.layers[layer];
  const asked = asks();
  cards.forEach((card, h) => {
    const maps = mapsOf(layer, h, query());
    for (const [part, node] of Object.entries(card.maps)) {
      const shares = patchesOf(maps[part], layer);
      drawMap(node, shares, part, asked, part === "position" && centreOf(layer, h));
      const shown = state.key ?? shares.indexOf(Math.max(...shares));
      card.values[part].textContent = `${state.key === null ? "most " : ""}${shares[shown].toFixed(3)}`;
    }
    const far = asked === null ? null : reach(patchesOf(maps.mixture, layer), asked);
    card.far.textContent = far === null ? "" : `looks ${far.toFixed(2)} patches far`;
    if (card.token) {
      card.swatch.style.background = `rgb(${colour(maps.mixture[0], "content")})`;
      card.token.textContent = `class token ${maps.mixture[0].toFixed(3)}`;
    }
    if (card.gate) {
      const gate = knobs.gates[layer][h];
      setSlider(card.gate, gate, `gate ${gate.toFixed(2)}`);
    }
    if (card.factor) {
      const factor = knobs.factors[layer][h];
      setSlider(card.factor, factor, `strength ${(-factor * position[h][2]).toFixed(2)}`);
    }
  });
}

function drawScales() {
  const kinds = data.layers[state.layer].kind === "mhsa" ? ["content"] : Object.keys(colours);
  const bars = kinds.map((kind) => {
    const canvas = el("canvas");
    paint(canvas, 256, 1, (i) => colours[kind][i]);
    const ticks = TICKS.map((tick) =>
      el("span", { style: `left:${100 * Math.sqrt(tick / TOP)}%` }, tick === TOP ? `${tick} or more` : `${tick}`));
    return el("div", {}, el("span", { class: kind }, kind), canvas, el("div", { class: "ticks" }, ...ticks));
  });
  $("scales").replaceChildren(...bars);
}

// The words beside a layer

function joinText() {
  const joins = data.classTokenJoins;
  if (joins >= depth) return "This model has no class token.";
  return joins ? `The class token joins after layer ${joins}.` : "The class token joins before layer 1.";
}

function drawLayer() {
  const { kind } = data.layers[state.layer];
  const number = state.layer + 1;
  const b = (part, text) => el("b", { class: part }, text);
  const formulas = {
    gpsa: [b("mixture", "A"), " = (1 − g) ", b("content", "C"), " + g ", b("position", "P")],
    psa: [b("mixture", "A"), " = softmax(", b("content", "content scores"), " + ", b("position", "position scores"), ")"],
    mhsa: ["A = ", b("content", "C"), " = softmax(q · k / √d)"],
  };
  const helps = {
    gpsa: ["Layer ", number, " is GPSA: content attention C finds patches that fit, position attention P a " +
      "place beside the patch that asks. The gate g mixes the two. ", joinText(),
      data.classTokenJoins < depth ? " So nobody can ask it here (" : " (",
      tutorial("10-gpsa.md", "page 10: GPSA"), ", ", tutorial("12-convit.md", "page 12: the class token"), ")."],
    psa: ["Layer ", number, " is PSA: the scores of content and position are added before one softmax, so the two " +
      "maps are multiplied and rescaled. There is no gate, and the sharper of the two decides. ", joinText(), " (",
      tutorial("10-gpsa.md", "page 10: why a gate"), ")"],
    mhsa: ["Layer ", number, " is MHSA, plain attention: content alone, with no position and no gate. ", joinText(),
      " So it can be asked here, and it has a share in what the patches look at (",
      tutorial("07-attention.md", "page 7: attention"), ", ", tutorial("12-convit.md", "page 12: the class token"), ")."],
  };
  write("formula", formulas[kind]);
  write("layer-help", helps[kind]);
  const local = data.layers.some((layer) => layer.kind === "gpsa");
  show($("gate-knob"), kind === "gpsa");
  show($("strength-knob"), kind !== "mhsa");
  write("no-gate", kind === "gpsa" ? "" : local
    ? `Layer ${number} has no gate: choose one of the ${layerNames("gpsa")}.`
    : "No layer of this model has a gate: it has no GPSA.");
  write("no-strength", kind !== "mhsa" ? "" : `Layer ${number} has no position attention, and so no locality strength.`);
  show($("no-gate"), kind !== "gpsa");
  show($("no-strength"), kind === "mhsa");
  const anyKnob = data.layers.some((layer) => layer.kind !== "mhsa");
  show($("reset"), anyKnob);
  write("knobs-reach", kind === "mhsa" ? "" : params
    ? "The whole model runs in this page. A knob changes this layer, all layers after it, and the answer below."
    : "This model is too large to run in a page. A knob changes the maps of this layer, and not what comes after it.");
  drawScales();
}

function drawKnobs() {
  const { kind } = data.layers[state.layer];
  if (kind === "mhsa") return;
  const describe = (id, values, say) => {
    const mean = values.reduce((a, b) => a + b) / values.length;
    const equal = values.every((value) => value === values[0]);
    const words = equal ? say(values[0]) : `${say(Math.min(...values))} to ${say(Math.max(...values))}`;
    $(id).value = mean;
    $(id).setAttribute("aria-valuetext", words);
    write(`${id}-value`, words);
  };
  if (kind === "gpsa") describe("all-gates", state.knobs.gates[state.layer], (v) => v.toFixed(2));
  describe("all-factors", state.knobs.factors[state.layer], (v) => `× ${v.toFixed(2)}`);
}

// The prediction

function buildReader() {
  const figure = (name) => {
    const node = newMap(el("div", { class: "map heads-map", role: "img", "data-name": name }));
    const itself = el("output");
    return { node, itself, figure: el("figure", {}, node, el("figcaption", {}, name, itself)) };
  };
  buildReader.maps = [...Array(data.heads).keys()].map((h) => figure(`head ${h + 1}`));
  buildReader.mean = figure("mean of the heads");
  $("reader").replaceChildren(...[...buildReader.maps, buildReader.mean].map((map) => map.figure));
  const token = hasToken(lastLayer);
  const where = token ? layerNames("mhsa") : "";
  write("reader-help", token
    ? ["The answer is read from the class token, a vector that stands for no patch. ", joinText(),
      ` So its attention exists in ${where} alone, and these are its maps in layer ${depth} (`,
      tutorial("12-convit.md", "page 12: the class token"), ")."]
    : ["This model has no class token: it would join after the last GPSA layer, and there is no other. The answer is " +
      "read from the first patch, as in the official code. These are the maps of that patch in the last layer (",
      tutorial("12-convit.md", "page 12: the whole model"), ")."]);
  write("prediction-help", [
    params && data.layers.some(({ kind }) => kind !== "mhsa")
      ? "Turn a knob above and see what the answer hangs on. The thin mark is the answer as trained. "
      : "This is the answer of the trained model. It does not change with the maps above. ",
    "Shares come from the logits by a softmax (", tutorial("02-softmax.md", "page 2: softmax"), ").",
  ]);
}

function drawPrediction() {
  const image = data.images[state.image];
  const kind = data.layers[lastLayer].kind === "mhsa" ? "content" : "mixture";
  const maps = buildReader.maps.map(({ node, itself }, h) => {
    const { mixture } = mapsOf(lastLayer, h, 0);
    const shares = patchesOf(mixture, lastLayer);
    drawMap(node, shares, kind, hasToken(lastLayer) ? null : 0);
    itself.textContent = hasToken(lastLayer) ? `itself ${mixture[0].toFixed(3)}` : "";
    return shares;
  });
  const mean = maps[0].map((_, i) => maps.reduce((sum, map) => sum + map[i], 0) / maps.length);
  drawMap(buildReader.mean.node, mean, kind, hasToken(lastLayer) ? null : 0);
  const shares = probabilities();
  const order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a]).slice(0, 5);
  const { truth } = image;
  const told = [`It says ${className(order[0])}, ${percent(shares[order[0]])}. `];
  if (truth !== null) {
    const isRight = order[0] === truth;
    const words = isRight ? "That is right." : `It is ${className(truth)}.`;
    told.push(el("span", { class: isRight ? "is-right" : "is-wrong" }, words));
  }
  const many = shares.length > 1;
  write("verdict", many ? told : "This model has one logit: it tells no classes apart.");
  $("classes").replaceChildren(...(many ? order : []).map((index, i) =>
    el("li", { class: i ? "" : "first" }, el("b", {}, className(index)), el("output", {}, percent(shares[index])),
      el("div", { class: "bar", "aria-hidden": "true" }, el("i", { style: `width:${100 * shares[index]}%` }),
        el("u", { style: `left:${100 * image.probabilities[index]}%` })))));
}

// The training

const lineColour = (i, count) =>
  `color-mix(in oklch, var(--last-line) ${(100 * i) / Math.max(count - 1, 1)}%, var(--first-line))`;

function drawHistory() {
  if (!data.history) return;
  const { epochs, gates, strengths, nonlocality } = data.history;
  write("epoch-value", `${epochs[state.epoch]}`);
  $("epoch").setAttribute("aria-valuetext", `epoch ${epochs[state.epoch]}`);
  const { kind } = data.layers[state.layer];
  const name = kind === "psa" ? "Strengths" : "Gates";
  write("gates-title", `${name} of the heads in layer ${state.layer + 1}`);
  const perHead = { gpsa: gates, psa: strengths, mhsa: [] }[kind];
  if (perHead.length) {
    const lines = [...Array(data.heads).keys()].map((h) => ({
      name: `head ${h + 1}`,
      values: perHead.map((layers) => layers[state.layer][h]),
    }));
    drawChart($("gates-chart"), lines, null);
  } else {
    $("gates-chart").replaceChildren(el("p", { class: "note" }, $("no-gate").textContent));
  }
  const lines = data.layers.map((layer, i) => ({
    name: `layer ${i + 1} ${layer.kind.toUpperCase()}`,
    faint: i !== state.layer,
    values: nonlocality.map((layers) => layers[i].reduce((a, b) => a + b) / data.heads),
  }));
  drawChart($("nonlocality-chart"), lines, data.uniform);
}

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
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "curves; the values follow" });
  for (let tick = low; tick < high + step / 2; tick += step)
    svg.append(el("line", { class: "axis", x1: left, x2: width - 12, y1: y(tick), y2: y(tick) }),
      el("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, `${Number(tick.toFixed(3))}`));
  const apart = Math.ceil(epochs.length / Math.floor(width / 60));
  epochs.forEach((epoch, i) => {
    if (i % apart === 0) svg.append(el("text", { x: x(i), y: height - 6, "text-anchor": "middle" }, `${epoch}`));
  });
  if (even !== null) svg.append(el("line", { class: "even", x1: left, x2: width - 12, y1: y(even), y2: y(even) }));
  lines.forEach(({ values, faint }, i) => {
    const points = values.map((value, at) => `${x(at)},${y(value)}`).join(" ");
    svg.append(el("polyline", { points, class: faint ? "faint" : "", style: `stroke:${lineColour(i, lines.length)}` }));
  });
  svg.append(el("line", { class: "cursor", x1: x(state.epoch), x2: x(state.epoch), y1: 6, y2: height - bottom }));
  const values = lines.map(({ name, values }, i) =>
    el("li", {}, el("i", { style: `background:${lineColour(i, lines.length)}` }), `${name} ${values[state.epoch].toFixed(3)}`));
  node.className = "chart";
  node.replaceChildren(svg, el("ul", { class: "values" }, ...values));
}

// Start here

// Buttons that set all layers' knobs, and what to watch then: [name, gate, factor, words].
function tourSteps() {
  const kind = data.layers[Math.max(firstLook, 0)].kind;
  const answer = params ? " What becomes of the answer?" : "";
  const more = {
    gpsa: [
      ["Content alone", 0, 1, `All gates are 0: each head looks for patches that fit, wherever they lie.${answer}`],
      ["Position alone", 1, 1, `All gates are 1: the heads ignore the image. Choose another, and the maps stay.${answer}`],
      ["A convolution", 1, LOCALITY, `Gates at 1 and sharp spots: each head reads one place, as a weight of a kernel does.${answer}`],
    ],
    psa: [
      ["Content alone", null, 0, `All strengths are 0: position is even everywhere, and content decides.${answer}`],
      ["Sharp positions", null, LOCALITY, `Four times the strength: without a gate, the sharper part wins.${answer}`],
    ],
    mhsa: [],
  };
  const first = "Move over the image. Do all heads look at the same place? Which of them leave the neighbourhood of the patch that asks?";
  const last = "The class token asks in the last layer. The answer is read from it, so what it looks at can count.";
  const token = hasToken(lastLayer) ? [["The class token", null, 1, last]] : [];
  return [["As trained", null, 1, first], ...more[kind], ...token];
}

function takeStep([name, gate, factor, words]) {
  state.tokenAsks = name === "The class token";
  state.knobs = trained();
  state.knobs.gates.forEach((gates) => gate !== null && gates?.fill(gate));
  state.knobs.factors.forEach((factors) => factors.fill(factor));
  if (state.tokenAsks) chooseLayer(lastLayer);
  else if (firstLook >= 0 && data.layers[state.layer].kind === "mhsa") chooseLayer(firstLook);
  write("tour-text", words);
  update();
}

// Changes

function chooseLayer(layer) {
  state.layer = layer;
  state.tokenAsks &&= hasToken(layer);
  checkLayer(layer);
  buildHeads();
  drawLayer();
}

let waiting = false;

// Takes over the changes and draws all of it, once a frame however many events there are.
function update(changes = {}) {
  Object.assign(state, changes);
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

function draw() {
  drawPicture();
  drawHeads();
  drawKnobs();
  drawPrediction();
  drawHistory();
  const token = $("ask-token");
  token.setAttribute("aria-pressed", state.tokenAsks);
  token.disabled = !hasToken(state.layer);
  token.textContent = `Let the class token ask${token.disabled ? ` (${layerNames("mhsa")})` : ""}`;
}

function moveBy(event) {
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
  if (event.key === "Escape") return update({ key: null });
  if (!down && !right) return;
  event.preventDefault();
  const from = (event.shiftKey ? state.key : null) ?? asks() ?? state.patch;
  const row = Math.min(rows - 1, Math.max(0, Math.floor(from / cols) + down));
  const col = Math.min(cols - 1, Math.max(0, (from % cols) + right));
  const to = row * cols + col;
  update(event.shiftKey ? { key: to } : { patch: to, hovered: null, tokenAsks: false });
}

function listen() {
  const picture = $("picture");
  picture.addEventListener("pointermove", (event) => update({ hovered: patchAt(picture, event) }));
  picture.addEventListener("pointerdown", (event) => update({ patch: patchAt(picture, event), tokenAsks: false }));
  picture.addEventListener("pointerleave", () => update({ hovered: null }));
  picture.addEventListener("keydown", moveBy);
  $("ask-token").addEventListener("click", () => update({ tokenAsks: !state.tokenAsks }));
  $("over").addEventListener("change", (event) => update({ over: event.target.value }));
  $("all-gates").addEventListener("input", (event) => {
    state.knobs.gates[state.layer].fill(Number(event.target.value));
    update();
  });
  $("all-factors").addEventListener("input", (event) => {
    state.knobs.factors[state.layer].fill(Number(event.target.value));
    update();
  });
  $("reset").addEventListener("click", () => update({ knobs: trained() }));
  $("epoch").addEventListener("input", (event) => update({ epoch: Number(event.target.value) }));
  window.addEventListener("resize", () => update());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readColours();
    drawScales();
    update();
  });
}

let checkLayer;

function begin() {
  const kinds = ["gpsa", "psa", "mhsa"].filter(layerNames);
  const named = kinds.map((kind) => `${layerNames(kind)} ${kind.toUpperCase()}`);
  document.title = `${data.title}: where does it look?`;
  write("model", `${data.title}: ${data.heads} heads in each of ${depth} layers, ${rows} × ${cols} patches; ${list(named)}.`);
  for (const link of document.querySelectorAll("a[data-page]"))
    if (data.tutorials) link.href = `${data.tutorials}/${link.dataset.page}`;
  const thumbnails = data.images.map((image) => {
    const face = el("canvas");
    paintPicture(face, image);
    const truth = image.truth === null ? "" : `, ${className(image.truth)}`;
    return { label: `${image.name}${truth}`, face };
  });
  choices("images", thumbnails, 0, (image) => update({ image }));
  checkLayer = choices("layers", data.layers.map(({ kind }, i) => ({
    label: `layer ${i + 1}, ${kind.toUpperCase()}${isHeld(i) ? "" : ", not in this page"}`,
    face: el("span", {}, `${i + 1} `, el("small", {}, kind.toUpperCase())),
    disabled: !isHeld(i),
  })), state.layer, (layer) => {
    chooseLayer(layer);
    update();
  });
  const heads = Array.from({ length: data.heads }, (_, h) => [h, `head ${h + 1}`]);
  $("over").append(...[["none", "nothing"], ["mean", "the mean of the heads"], ...heads].map(([value, text]) =>
    el("option", { value }, text)));
  const steps = tourSteps();
  $("tour-buttons").append(...steps.map((step) => el("button", { type: "button", onclick: () => takeStep(step) }, step[0])));
  write("tour-text", steps[0].at(-1));
  show($("no-history"), !data.history);
  show($("history"), data.history);
  write("no-history", data.history ? "" : "This checkpoint comes without the readings of its training, so there is no time line: " +
    "a run folder of miniconvit train has them.");
  const begun = { gpsa: "Every gate begins at the same value, and each head finds its own. ", psa: "Every strength begins at " +
    "the same value, and each head finds its own. ", mhsa: "" }[data.layers[0].kind];
  write("history-help", ["Drag the epoch and read the values below the curves. ", begun, "A layer that rises in the picture of " +
    "nonlocality leaves its neighbourhood: the dotted line is attention spread evenly (", tutorial("14-training.md", "page 14: training"),
    ", ", tutorial("16-looking-inside.md", "page 16: looking inside"), ")."]);
  if (data.history) Object.assign($("epoch"), { max: data.history.epochs.length - 1, value: state.epoch });
  write("left-out", data.leftOut.join(" "));
  newMap($("picture"));
  readColours();
  buildHeads();
  buildReader();
  drawLayer();
  show($("ask-token"), hasToken(lastLayer));
  listen();
  draw();
}

begin();
