// What the page says where that depends on the model. Links to the tutorials are written as in
// Markdown: [page 7: attention](07-attention.md).

const joins = data.classTokenJoins;
const anyKnob = data.layers.some(({ kind }) => kind !== "mhsa");
const CLASS_TOKEN = "[page 12: the class token](12-convit.md)";

function layerNames(kind) {
  const numbers = data.layers.flatMap((layer, i) => (layer.kind === kind ? [i + 1] : []));
  const range = numbers.length > 2 ? `${numbers[0]} to ${numbers.at(-1)}` : list(numbers);
  return numbers.length && `${numbers.length > 1 ? "layers" : "layer"} ${range}`;
}

const joinWords =
  joins >= depth
    ? "This model has no class token"
    : `The class token joins ${joins ? `after layer ${joins}` : "before layer 1"}`;

const modelWords =
  `${data.title}: ${data.heads} heads in each of ${depth} layers, ${rows} × ${cols} patches; ` +
  list(
    ["gpsa", "psa", "mhsa"].filter(layerNames).map((k) => `${layerNames(k)} ${k.toUpperCase()}`),
  );

const layerWords = {
  gpsa: (number) =>
    `Layer ${number} is GPSA: content attention C finds patches that fit, position attention P a ` +
    "place beside the patch that asks. The gate g mixes the two ([page 10: GPSA](10-gpsa.md)). " +
    `${joinWords}${joins < depth ? ", so nobody can ask it here" : ""} (${CLASS_TOKEN}).`,
  psa: (number) =>
    `Layer ${number} is PSA: the scores of content and position are added before one softmax, so ` +
    "the two maps are multiplied and rescaled. There is no gate, and the sharper of the two " +
    `decides ([page 10: why a gate](10-gpsa.md)). ${joinWords} (${CLASS_TOKEN}).`,
  mhsa: (number) =>
    `Layer ${number} is MHSA, plain attention: content alone, with no position and no gate ` +
    `([page 7: attention](07-attention.md)). ${joinWords}. So you can ask it here, and the patches ` +
    `look at it too (${CLASS_TOKEN}).`,
};

const formulas = {
  gpsa: "*mixture:A* = (1 − g) *content:C* + g *position:P*",
  psa: "*mixture:A* = softmax(*content:content scores* + *position:position scores*)",
  mhsa: "A = *content:C* = softmax(q · k / √d)",
};

// Why a knob is absent, or "".
function gateWords(number, kind) {
  if (kind === "gpsa") return "";
  if (!anyKnob)
    return "This model has no knobs: all its layers are MHSA, without gate or position.";
  const other = layerNames("gpsa");
  if (!other) return "No layer of this model has a gate: it has no GPSA.";
  return `Layer ${number} has no gate: choose one of the ${other}.`;
}

function strengthWords(number, kind) {
  const lacks = kind === "mhsa" && anyKnob;
  return lacks ? `Layer ${number} has no position attention, and so no locality strength.` : "";
}

function reachWords(kind) {
  if (kind === "mhsa") return "";
  return params
    ? "The whole model runs in this page. A knob changes this layer, all layers after it, and the " +
        "answer below the image."
    : "This model is too large to run in a page. A knob changes the maps of this layer, and not " +
        "what comes after it.";
}

const readerWords =
  joins < depth
    ? "The answer is read from the class token, a vector that stands for no patch. " +
      `${joinWords}, so it looks around ${joins ? `in ${layerNames("mhsa")} alone` : "in every layer"}. ` +
      `Here is what it looks at in layer ${depth} (${CLASS_TOKEN}).`
    : "This model has no class token: it would join after the last GPSA layer, and there is no " +
      "other. The answer is read from the first patch, as in the official code. Here is what that " +
      "patch looks at in the last layer ([page 12: the whole model](12-convit.md)).";

const predictionWords =
  (params && anyKnob
    ? "Turn a knob above and see what the answer hangs on. The thin mark is the answer as trained. "
    : "This is the answer of the trained model. It does not change with the maps above. ") +
  "A softmax makes these shares of the logits ([page 2: softmax](02-softmax.md)).";

const historyWords =
  "Drag the epoch and read the values below the curves. " +
  (anyKnob
    ? `In a fresh model every ${data.layers[0].kind === "gpsa" ? "gate" : "strength"} begins at ` +
      "the same value, and each head finds its own. "
    : "This model has no gates to show. ") +
  "A layer that rises in the picture of nonlocality leaves its neighbourhood: the dotted line is " +
  "attention spread evenly ([page 14: training](14-training.md), " +
  "[page 16: looking inside](16-looking-inside.md)).";

const noHistoryWords =
  "There is no time line here: a run folder of miniconvit train gives one, on its own data.";

// Start here: buttons that set all layers' knobs, and what to watch then.
const answerWords = params ? " What becomes of the answer?" : "";
const localSteps = {
  gpsa: [
    { name: "Content alone", gate: 0 },
    { name: "Position alone", gate: 1 },
    { name: "A convolution", gate: 1, factor: LOCALITY },
  ],
  psa: [
    { name: "No positions", factor: 0 },
    { name: "Sharp positions", factor: LOCALITY },
  ],
  mhsa: [],
}[data.layers[0].kind];
const stepWords = {
  "As trained":
    "Move over the image. Do all heads look at the same place? Which of them leave the " +
    "neighbourhood of the patch that asks?",
  "Content alone": `All gates are 0: each head looks for patches that fit, wherever they lie.${answerWords}`,
  "Position alone": `All gates are 1: the heads ignore the image. Choose another: the maps stay.${answerWords}`,
  "A convolution": `Gates at 1 and sharp spots: each head reads one place, as a weight of a kernel does.${answerWords}`,
  "No positions": `All strengths are 0: position is even everywhere, and content decides.${answerWords}`,
  "Sharp positions": `Four times the strength: without a gate, the sharper part wins.${answerWords}`,
  "The class token":
    "The class token asks in the last layer. The answer is read from it, so what it looks at can " +
    "count.",
};
const steps = [
  { name: "As trained" },
  ...localSteps,
  ...(joins < depth ? [{ name: "The class token" }] : []),
];
