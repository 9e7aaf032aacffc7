// The whole ConViT, forward: miniconvit/model.py once more, for one image, on lists of vectors.

// y = x weight^T + bias for each token x.
function linear(tokens, weight, bias) {
  return tokens.map((x) => {
    const y = new Float64Array(weight.length);
    for (let o = 0; o < y.length; o++) y[o] = dot(weight[o], x) + (bias ? bias[o] : 0);
    return y;
  });
}

function layernorm(tokens, weight, bias) {
  return tokens.map((x) => {
    const mean = x.reduce((a, b) => a + b) / x.length;
    const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length;
    return x.map((v, i) => (weight[i] * (v - mean)) / Math.sqrt(variance + 1e-6) + bias[i]);
  });
}

// Abramowitz and Stegun 7.1.26: the error is below 1.5e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const factors = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
  const series = factors.reduce((sum, factor) => (sum + factor) * t, 0);
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

const gelu = (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2));
const add = (a, b) => a.map((x, n) => x.map((value, i) => value + b[n][i]));

// Head h of tokens whose vectors hold the heads side by side, from `start` on.
const headOf = (tokens, h, d, start = 0) =>
  tokens.map((x) => x.subarray(start + h * d, start + (h + 1) * d));

// Token row * cols + col is its patch, flattened as (channel, y, x), times the weight.
function patchEmbed(pixels, model, params) {
  const { mean, std } = model;
  const [[rows, cols], [height, width]] = [model.grid, model.size];
  const [ph, pw] = [height / rows, width / cols];
  const patches = Array.from({ length: rows * cols }, (_, n) => {
    const patch = [];
    for (let c = 0; c < mean.length; c++)
      for (let y = Math.floor(n / cols) * ph, bottom = y + ph; y < bottom; y++)
        for (let x = (n % cols) * pw, right = x + pw; x < right; x++)
          patch.push((pixels[(c * height + y) * width + x] / 255 - mean[c]) / std[c]);
    return Float64Array.from(patch);
  });
  return dense(patches, (name) => params[name], "patch_embed.proj");
}

// p gives the parameters of a block by their short names.
const dense = (x, p, name) => linear(x, p(`${name}.weight`), p(`${name}.bias`));
const norm = (x, p, name) => layernorm(x, p(`${name}.weight`), p(`${name}.bias`));

// q, k and v of all heads side by side: of MHSA one layer makes them, of GPSA and PSA two.
function project(x, p, kind) {
  if (kind === "mhsa") return dense(x, p, "attn.qkv");
  const values = dense(x, p, "attn.v");
  return dense(x, p, "attn.qk").map((qk, n) => Float64Array.of(...qk, ...values[n]));
}

// {q, k} of each head, and what all heads read, side by side.
function attention(x, p, i, model, knobs) {
  const d = x[0].length / model.heads;
  const qkv = project(x, p, model.layers[i].kind);
  const read = x.map((token) => new Float64Array(token.length));
  const heads = Array.from({ length: model.heads }, (_, h) => {
    const [q, k, v] = [0, 1, 2].map((part) => headOf(qkv, h, d, part * d * model.heads));
    const head = headWith(model, i, h, { q, k }, knobs);
    read.forEach((y, query) =>
      attend(head, query).mixture.forEach((share, key) => {
        for (let j = 0; j < d; j++) y[h * d + j] += share * v[key][j];
      }),
    );
    return { q, k };
  });
  return [heads, read];
}

// q and k of each head of each layer, and the logits; knobs: each layer's gates and the factors of
// its position weights, head by head.
function convit(pixels, model, params, knobs) {
  let x = patchEmbed(pixels, model, params);
  if (params["pos_embed"]) x = add(x, params["pos_embed"]);
  const layers = model.layers.map((_, i) => {
    const p = (name) => params[`blocks.${i}.${name}`];
    if (i === model.classTokenJoins) x = [params["cls_token"][0], ...x];
    const [heads, read] = attention(norm(x, p, "norm1"), p, i, model, knobs);
    x = add(x, dense(read, p, "attn.proj"));
    const hidden = dense(norm(x, p, "norm2"), p, "mlp.fc1").map((token) => token.map(gelu));
    x = add(x, dense(hidden, p, "mlp.fc2"));
    return heads;
  });
  const whole = (name) => params[name];
  const [logits] = dense(norm(x.slice(0, 1), whole, "norm"), whole, "head");
  return { layers, logits };
}

// What attend needs of one head, as the knobs are set.
function headWith(model, i, h, { q, k }, knobs) {
  const { kind, position } = model.layers[i];
  const w = position && position[h].map((value) => value * knobs.factors[i][h]);
  return { kind, q, k, w, gate: knobs.gates[i]?.[h], grid: model.grid };
}
