// What one token looks at: the formulas of miniconvit/layers/gpsa.py, psa.py and attention.py.

// exp(score) / sum of exp(scores): shares, which sum to one.
function softmax(scores) {
  const top = scores.reduce((a, b) => Math.max(a, b));
  const powers = scores.map((score) => Math.exp(score - top));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

// q . k / sqrt(d) for each key: how well what the query asks fits what a token offers.
function contentScores(q, keys) {
  return keys.map((k) => dot(q, k) / Math.sqrt(q.length));
}

// w0 dx + w1 dy + w2 (dx^2 + dy^2) for each patch, (dx, dy) being the way there from the query.
function positionScores([w0, w1, w2], query, [rows, cols]) {
  return Array.from({ length: rows * cols }, (_, key) => {
    const dx = (key % cols) - (query % cols);
    const dy = Math.floor(key / cols) - Math.floor(query / cols);
    return w0 * dx + w1 * dy + w2 * (dx * dx + dy * dy);
  });
}

// The shares that a token gives to all tokens, in one head: {q, k: vectors of all tokens, w: the
// three numbers of its position, gate: the share of position}. What a kind lacks is left out.
function attend({ kind, q, k, w, gate, grid }, query) {
  const scores = contentScores(q[query], k);
  const content = softmax(scores);
  if (kind === "mhsa") return { content, mixture: content };
  const places = positionScores(w, query, grid);
  const position = softmax(places);
  const mixture =
    kind === "gpsa"
      ? content.map((share, key) => (1 - gate) * share + gate * position[key])
      : softmax(scores.map((score, key) => score + places[key])); // psa: one softmax for both
  return { content, position, mixture };
}
