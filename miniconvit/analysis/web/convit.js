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
  const { grid: [rows, cols], size: [height, width], mean, std } = model;
  const [ph, pw] = [height / rows, width / cols];
  const patches = Array.from({ length: rows * cols }, (_, n) => {
    const patch = [];
    for (let c = 0; c < mean.length; c++)
      for (let y = Math.floor(n / cols) * ph, bottom = y + ph; y < bottom; y++)
        for (let x = (n % cols) * pw, right = x + pw; x < right; x++)
          patch.push((pixels[(c * height + y) * width + x] / 255 - mean[c]) / std[c]);
    return Float64Array.from(patch);
  });
  return linear(patches, params["patch_embed.proj.weight"], params["patch_embed.proj.bias"]);
}

// q and k of each head of each layer, and the logits; knobs: each layer's gates and the factors of
// its position weights, head by head.
function convit(pixels, model, params, knobs) {
  const d = params["norm.weight"].length / model.heads;
  let x = patchEmbed(pixels, model, params);
  if (params["pos_embed"]) x = add(x, params["pos_embed"]);
  const layers = model.layers.map(({ kind }, i) => {
    const p = (name) => params[`blocks.${i}.${name}`];
    if (i === model.classTokenJoins) x = [params["cls_token"][0], ...x];
    const normed = layernorm(x, p("norm1.weight"), p("norm1.bias"));
    const qkv = kind === "mhsa" ? ["attn.qkv"] : ["attn.qk", "attn.v"];
    const bias = p(`${qkv[0]}.bias`) && qkv.flatMap((name) => [...p(`${name}.bias`)]);
    const projected = linear(normed, qkv.flatMap((name) => p(`${name}.weight`)), bias);
    const heads = [];
    const y = x.map((token) => new Float64Array(token.length));
    for (let h = 0; h < model.heads; h++) {
      const [q, k, v] = [0, 1, 2].map((part) => headOf(projected, h, d, part * d * model.heads));
      heads.push({ q, k });
      const head = headWith(model, i, h, heads[h], knobs);
      y.forEach((out, query) =>
        attend(head, query).mixture.forEach((share, key) => {
          for (let j = 0; j < d; j++) out[h * d + j] += share * v[key][j];
        }),
      );
    }
    x = add(x, linear(y, p("attn.proj.weight"), p("attn.proj.bias")));
    const hidden = linear(layernorm(x, p("norm2.weight"), p("norm2.bias")), p("mlp.fc1.weight"), p("mlp.fc1.bias"));
    x = add(x, linear(hidden.map((token) => token.map(gelu)), p("mlp.fc2.weight"), p("mlp.fc2.bias")));
    return heads;
  });
  const [token] = layernorm(x.slice(0, 1), params["norm.weight"], params["norm.bias"]);
  const [logits] = linear([token], params["head.weight"], params["head.bias"]);
  return { layers, logits };
}

// What attend needs of one head, as the knobs are set.
function headWith(model, i, h, { q, k }, knobs) {
  const { kind, position } = model.layers[i];
  const w = position && position[h].map((value) => value * knobs.factors[i][h]);
  return { kind, q, k, w, gate: knobs.gates[i]?.[h], grid: model.grid };
}
