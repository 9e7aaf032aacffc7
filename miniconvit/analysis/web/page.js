// The page: what each part shows, and what changes it.

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
  const read =
    state.key === null ? "" : ` It gives to ${placeName(state.key)} the shares below the maps.`;
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
  const card = { maps: {}, values: {}, far: el("span", { class: "value" }) };
  const lines = [[], [], []];
  kinds.forEach((part, i) => {
    card.maps[part] = readable(`${part} of ${name.toLowerCase()}`);
    card.values[part] = el("span", { class: "value" });
    const parts = [el("small", { class: part }, part), card.maps[part], card.values[part]];
    parts.forEach((node, line) => {
      if (i)
        lines[line].push(
          el("span", { class: "sign", "aria-hidden": "true" }, line === 1 ? signs[i - 1] : ""),
        );
      lines[line].push(node);
    });
  });
  card.node = el(
    "article",
    { class: "head", "aria-label": name },
    el("header", {}, el("h3", {}, name), card.far),
    el("div", { class: kinds.length > 1 ? "maps" : "maps one" }, ...lines.flat()),
  );
  if (hasToken(state.layer)) {
    card.swatch = el("span", { class: "swatch" });
    card.token = el("span", { class: "value" });
    card.node.append(el("div", { class: "class-token" }, card.swatch, card.token));
  }
  if (kind === "gpsa")
    card.gate = newSlider(card.node, `gate of ${name.toLowerCase()}`, "gate", 1, 0.01, (value) => {
      state.knobs.gates[state.layer][h] = value;
    });
  if (kind !== "mhsa") {
    card.factor = newSlider(
      card.node,
      `locality strength of ${name.toLowerCase()}`,
      "strength",
      LOCALITY,
      0.05,
      (value) => {
        state.knobs.factors[state.layer][h] = value;
      },
    );
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
      card.values[part].textContent =
        `${state.key === null ? "most " : ""}${shares[shown].toFixed(3)}`;
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
      el(
        "span",
        { style: `left:${100 * Math.sqrt(tick / TOP)}%` },
        tick === TOP ? `${tick} or more` : `${tick}`,
      ),
    );
    return el(
      "div",
      {},
      el("span", { class: kind }, kind),
      canvas,
      el("div", { class: "ticks" }, ...ticks),
    );
  });
  $("scales").replaceChildren(...bars);
}

// The words and the knobs of a layer

function drawLayer() {
  const { kind } = data.layers[state.layer];
  const number = state.layer + 1;
  prose("formula", formulas[kind]);
  prose("layer-help", layerWords[kind](number));
  show($("gate-knob"), kind === "gpsa");
  show($("strength-knob"), kind !== "mhsa");
  prose("no-gate", gateWords(number, kind));
  prose("no-strength", strengthWords(number, kind));
  prose("knobs-reach", reachWords(kind));
  drawScales();
}

function drawKnobs() {
  const { kind } = data.layers[state.layer];
  if (kind === "mhsa") return;
  const describe = (id, values, say) => {
    const mean = values.reduce((a, b) => a + b) / values.length;
    const [least, most] = [say(Math.min(...values)), say(Math.max(...values))];
    const words = least === most ? least : `${least} to ${most}`;
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
    const itself = el("span", { class: "value" });
    return { node, itself, figure: el("figure", {}, node, el("figcaption", {}, name, itself)) };
  };
  buildReader.maps = [...Array(data.heads).keys()].map((h) => figure(`head ${h + 1}`));
  buildReader.mean = figure("mean of the heads");
  $("reader").replaceChildren(...[...buildReader.maps, buildReader.mean].map((map) => map.figure));
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
  const order = shares
    .map((_, i) => i)
    .sort((a, b) => shares[b] - shares[a])
    .slice(0, 5);
  const { truth } = image;
  const told = [`It says ${className(order[0])}, ${percent(shares[order[0]])}. `];
  if (truth !== null) {
    const isRight = order[0] === truth;
    const words = isRight ? "That is right." : `It is ${className(truth)}.`;
    told.push(el("span", { class: isRight ? "is-right" : "is-wrong" }, words));
  }
  const many = shares.length > 1;
  write("verdict", many ? told : "This model has one logit: it tells no classes apart.");
  $("classes").replaceChildren(
    ...(many ? order : []).map((index, i) =>
      el(
        "li",
        { class: i ? "" : "first" },
        el("b", {}, className(index)),
        el("span", { class: "value" }, percent(shares[index])),
        el(
          "div",
          { class: "bar", "aria-hidden": "true" },
          el("i", { style: `width:${100 * shares[index]}%` }),
          el("u", { style: `left:${100 * image.probabilities[index]}%` }),
        ),
      ),
    ),
  );
}

// The training

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
    const why = gateWords(state.layer + 1, kind);
    $("gates-chart").replaceChildren(el("p", { class: "note" }, why));
  }
  const lines = data.layers.map((layer, i) => ({
    name: `layer ${i + 1} ${layer.kind.toUpperCase()}`,
    faint: i !== state.layer,
    values: nonlocality.map((layers) => layers[i].reduce((a, b) => a + b) / data.heads),
  }));
  drawChart($("nonlocality-chart"), lines, data.uniform);
}

// Start here

function takeStep({ name, gate = null, factor = 1 }) {
  state.tokenAsks = name === "The class token";
  state.knobs = trained();
  state.knobs.gates.forEach((gates) => gate !== null && gates?.fill(gate));
  state.knobs.factors.forEach((factors) => factors.fill(factor));
  if (state.tokenAsks) chooseLayer(lastLayer);
  else if (firstLook >= 0 && data.layers[state.layer].kind === "mhsa") chooseLayer(firstLook);
  prose("tour-text", stepWords[name]);
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
  const [down, right] = {
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
  }[event.key] ?? [0, 0];
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
  picture.addEventListener("pointerdown", (event) =>
    update({ patch: patchAt(picture, event), tokenAsks: false }),
  );
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

function buildChoices() {
  const thumbnails = data.images.map((image) => {
    const face = el("canvas");
    paintPicture(face, image);
    const truth = image.truth === null ? "" : `, ${className(image.truth)}`;
    return { label: `${image.name}${truth}`, face };
  });
  choices("images", thumbnails, 0, (image) => update({ image }));
  const layers = data.layers.map(({ kind }, i) => ({
    label: `layer ${i + 1}, ${kind.toUpperCase()}${isHeld(i) ? "" : ", not in this page"}`,
    face: el("span", {}, `${i + 1} `, el("small", {}, kind.toUpperCase())),
    disabled: !isHeld(i),
  }));
  checkLayer = choices("layers", layers, state.layer, (layer) => {
    chooseLayer(layer);
    update();
  });
  const heads = Array.from({ length: data.heads }, (_, h) => [h, `head ${h + 1}`]);
  const veils = [["none", "nothing"], ["mean", "the mean of the heads"], ...heads];
  $("over").append(...veils.map(([value, text]) => el("option", { value }, text)));
  const button = (step) =>
    el("button", { type: "button", onclick: () => takeStep(step) }, step.name);
  $("tour-buttons").append(...steps.map(button));
}

function begin() {
  document.title = `${data.title}: where does it look?`;
  write("model", modelWords);
  write("left-out", data.leftOut.join(" "));
  prose("tour-text", stepWords["As trained"]);
  prose("reader-help", readerWords);
  prose("prediction-help", predictionWords);
  prose("history-help", historyWords);
  prose("no-history", data.history ? "" : noHistoryWords);
  for (const link of document.querySelectorAll("a[data-page]"))
    if (data.tutorials) link.href = `${data.tutorials}/${link.dataset.page}`;
  show($("left-out"), data.leftOut.length);
  show($("history"), data.history);
  show($("head-curves"), anyKnob);
  show($("ask-token"), hasToken(lastLayer));
  show($("reset"), anyKnob);
  if (data.history)
    Object.assign($("epoch"), { max: data.history.epochs.length - 1, value: state.epoch });
  newMap($("picture"));
  readColours();
  buildChoices();
  buildHeads();
  buildReader();
  drawLayer();
  listen();
  draw();
}

begin();
