// What the page holds and what it computes: the model, the images, and how the knobs are set.

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
      : {
          layers: data.layers.map((_, i) => i in image.qk && storedHeads(image.qk[i], i)),
          logits: null,
        };
  }
  return look.result;
}

function storedHeads({ step, numbers }, layer) {
  const part = bytes(numbers); // three a number, the lowest first
  const all = Float64Array.from({ length: part.length / 3 }, (_, i) => {
    const bits = (part[3 * i] << 8) | (part[3 * i + 1] << 16) | (part[3 * i + 2] << 24);
    return step * (bits >> 8);
  });
  const tokens = rows * cols + (hasToken(layer) ? 1 : 0);
  const [q, k] = rowsOf(all, 2).map((both) => rowsOf(both, data.heads));
  return q.map((_, h) => ({ q: rowsOf(q[h], tokens), k: rowsOf(k[h], tokens) }));
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
