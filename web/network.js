// SimpleUNet of models/unet.py in JavaScript: the same layers, with the same names, for one image at a time.
//
// A tensor is {data, channels, height, width}; data is a Float32Array that holds the channels of a pixel side by side
// (H, W, C). Images go in and come out as plain arrays (C, H, W), as PyTorch has them.

const EPSILON = 1e-5;  // of GroupNorm

const tensor = (channels, height, width) =>
  ({channels, height, width, data: new Float32Array(channels * height * width)});
const gcd = (a, b) => b ? gcd(b, a % b) : a;

// -------------------------------------------------------------------------------------------------- the layers

// number -> number
const ACTIVATIONS = {
  silu: (x) => x / (1 + Math.exp(-x)),
  gelu: (x) => x * (1 + erf(x * Math.SQRT1_2)) / 2,
  relu: (x) => Math.max(x, 0),
  mish: (x) => x * Math.tanh(x > 20 ? x : Math.log1p(Math.exp(x))),
};

// Abramowitz and Stegun 1964, 7.1.26: the error is at most 1.5e-7.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

function groupNorm(x, weight, bias) {
  const {channels, data} = x, groups = gcd(channels, Math.max(1, channels >> 3)), size = channels / groups;
  const sums = new Float64Array(channels), squares = new Float64Array(channels), result = {...x, data: data.slice()};
  for (let i = 0; i < data.length;)
    for (let c = 0; c < channels; c++, i++) {
      sums[c] += data[i];
      squares[c] += data[i] * data[i];
    }
  const scale = new Float64Array(channels), shift = new Float64Array(channels), count = data.length / groups;
  for (let g = 0; g < channels; g += size) {
    const mean = sums.subarray(g, g + size).reduce((a, b) => a + b) / count;
    const variance = squares.subarray(g, g + size).reduce((a, b) => a + b) / count - mean ** 2;
    for (let c = g; c < g + size; c++) {
      scale[c] = weight[c] / Math.sqrt(Math.max(variance, 0) + EPSILON);
      shift[c] = bias[c] - mean * scale[c];
    }
  }
  return scaleAndShift(result, scale, shift);
}

function scaleAndShift(x, scale, shift) {
  for (let i = 0; i < x.data.length;)
    for (let c = 0; c < x.channels; c++, i++) x.data[i] = x.data[i] * scale[c] + shift[c];
  return x;
}

function add(x, y) {
  for (let i = 0; i < x.data.length; i++) x.data[i] += y.data[i];
  return x;
}

function concatenate(x, y) {
  const result = tensor(x.channels + y.channels, x.height, x.width);
  for (let pixel = 0; pixel < x.height * x.width; pixel++)
    for (const [part, start] of [[x, 0], [y, x.channels]])
      result.data.set(part.data.subarray(pixel * part.channels, (pixel + 1) * part.channels),
                      pixel * result.channels + start);
  return result;
}

// Each pixel becomes 2 × 2.
function doubled(x) {
  const result = tensor(x.channels, 2 * x.height, 2 * x.width);
  for (let row = 0, target = 0; row < result.height; row++)
    for (let column = 0; column < result.width; column++, target += x.channels) {
      const source = ((row >> 1) * x.width + (column >> 1)) * x.channels;
      result.data.set(x.data.subarray(source, source + x.channels), target);
    }
  return result;
}

// (3C, H, W): queries, keys, values -> (C, H, W): softmax(q · k / sqrt(size)) · v of each head, over all pixels.
function attend({data, channels, height, width}, heads) {
  const result = tensor(channels / 3, height, width), out = result.data, width3 = channels, width1 = channels / 3;
  const pixels = height * width, size = width1 / heads, scale = 1 / Math.sqrt(size), scores = new Float64Array(pixels);
  for (let first = 0; first < width1; first += size)  // the first channel of each head
    for (let i = 0; i < pixels; i++) {
      const query = i * width3 + first, target = i * width1 + first;
      let largest = -Infinity, sum = 0;
      for (let j = 0, key = width1 + first; j < pixels; j++, key += width3) {
        let dot = 0;
        for (let c = 0; c < size; c++) dot += data[query + c] * data[key + c];
        scores[j] = dot * scale;
        largest = Math.max(largest, scores[j]);
      }
      for (let j = 0; j < pixels; j++) sum += scores[j] = Math.exp(scores[j] - largest);
      for (let j = 0, value = 2 * width1 + first; j < pixels; j++, value += width3) {
        const share = scores[j] / sum;
        for (let c = 0; c < size; c++) out[target + c] += share * data[value + c];
      }
    }
  return result;
}

// nn.PixelUnshuffle and nn.PixelShuffle: an array (C, H, W) <-> a tensor of C · patch² channels and 1/patch the size.
function unshuffle(image, [channels, height, width], patch) {
  const result = tensor(channels * patch ** 2, height / patch, width / patch);
  eachPixel(result, patch, (pixel, index) => { result.data[pixel] = image[index]; });
  return result;
}

function shuffle(x, patch) {
  const image = new Float32Array(x.data.length);
  eachPixel(x, patch, (pixel, index) => { image[index] = x.data[pixel]; });
  return image;
}

function eachPixel({channels, height, width}, patch, visit) {
  for (let y = 0, pixel = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      for (let c = 0; c < channels / patch ** 2; c++)
        for (let row = 0; row < patch; row++)
          for (let column = 0; column < patch; column++, pixel++)
            visit(pixel, ((c * height + y) * patch + row) * width * patch + x * patch + column);
}

// -------------------------------------------------------------------------------------------------------- the network

// The network of a checkpoint: (image (C, H, W), t, label, watch) -> array (C, H, W), or (2C, H, W) with learned
// variances. label null: no label. watch(name, tensor) sees the output of every block.
function createModel(config, weights, [, height, width], wasm) {
  const patch = config.patch_size, array = (name) => weights.get(name).data, has = (name) => weights.has(name);
  const convolutions = new Convolutions(weights, height / patch, width / patch, wasm);
  const conv = (name, stride) => (x) => convolutions.apply(name, x, stride), linear = conv;
  const norm = (name) => (x) => groupNorm(x, array(`${name}.weight`), array(`${name}.bias`));
  const act = (x) => ({...x, data: x.data.map(ACTIVATIONS[config.activation])});
  const names = [...weights.keys()];
  const list = (name, make, i = 0) => names.some((key) => key.startsWith(`${name}.${i}.`))
    ? [make(`${name}.${i}`), ...list(name, make, i + 1)] : [];  // of an nn.ModuleList

  function embedding(t, label) {
    const size = config.time_emb_dim / 2, sinusoids = tensor(2 * size, 1, 1);
    for (let i = 0; i < size; i++) {
      const angle = Math.fround(Math.fround(t) * Math.fround(Math.exp(-Math.log(10000) * i / size)));
      sinusoids.data[i] = Math.sin(angle);
      sinusoids.data[size + i] = Math.cos(angle);
    }
    const emb = linear("time_embedding.mlp.2")(act(linear("time_embedding.mlp.0")(sinusoids)));
    if (!config.num_classes) return emb;
    const row = label ?? config.num_classes;
    return add(emb, {data: array("label_embedding.weight").subarray(row * 2 * size, (row + 1) * 2 * size)});
  }

  function residualBlock(name) {
    const [norm1, norm2] = [norm(`${name}.norm1`), norm(`${name}.norm2`)];
    const [conv1, conv2, scaleShift] = ["conv1", "conv2", "scale_shift"].map((part) => conv(`${name}.${part}`));
    const skip = has(`${name}.skip.weight`) ? conv(`${name}.skip`) : (x) => x;
    return (x, emb) => {
      const h = conv1(act(norm1(x))), {data} = scaleShift(emb);
      const scale = data.subarray(0, h.channels).map((value) => 1 + value), shift = data.subarray(h.channels);
      return add(conv2(act(scaleAndShift(norm2(h), scale, shift))), skip(x));
    };
  }

  function attention(name) {
    if (!has(`${name}.qkv.weight`)) return (x) => x;
    const [normed, qkv, project] = [norm(`${name}.norm`), conv(`${name}.qkv`), conv(`${name}.project`)];
    return (x) => add(project(attend(qkv(normed(x)), gcd(x.channels, Math.max(1, x.channels >> 5)))), x);
  }

  function stage(name) {
    const blocks = list(`${name}.blocks`, residualBlock);
    const attentions = blocks.map((_, i) => attention(`${name}.attention.${i}`));
    return (x, emb) => blocks.reduce((h, block, i) => attentions[i](block(h, emb)), x);
  }

  const stem = conv("stem.1"), middle = stage("middle");
  const downs = list("downs", (name) => ({name, stage: stage(`${name}.stage`), down: conv(`${name}.down`, 2)}));
  const ups = list("ups", (name) => ({name, stage: stage(`${name}.stage`), up: conv(`${name}.up`)}));
  const headNorm = norm("head.0"), headConv = conv("head.2");

  return (image, t, label = null, watch = () => {}) => {
    const emb = act(embedding(t, label)), skips = [];
    let x = stem(unshuffle(image, [config.image_channels, height, width], patch));
    watch("stem", x);
    for (const {name, stage, down} of downs) {
      skips.push(stage(x, emb));
      watch(name, skips.at(-1));
      x = down(skips.at(-1));
    }
    x = middle(x, emb);
    watch("middle", x);
    for (const {name, stage, up} of ups) {
      x = stage(concatenate(up(doubled(x)), skips.pop()), emb);
      watch(name, x);
    }
    x = headConv(act(headNorm(x)));
    watch("head", x);
    return shuffle(x, patch);
  };
}
