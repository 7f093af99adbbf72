// Convolutions and linear maps by one matrix product: multiply.wat, or in JavaScript where there is no WebAssembly.

const PANEL = 8;  // outputs that the matrix product computes together
const roundUp = (number, step) => Math.ceil(number / step) * step;

// All convolutions and linear maps of a network. Their weights lie in one memory, beside a place for the input and one
// for the output of the layer that is being computed. weights: name -> {shape, data}; pixels: those of the largest
// tensor; wasm: the bytes of multiply.wasm, or null to do without WebAssembly.
class Convolutions {
  constructor(weights, height, width, wasm) {
    this.layers = new Map();
    let end = 0, inputs = 0, panels = 0;
    const take = (count) => (end += count) - count;
    for (const [name, {shape}] of weights) {
      if (!name.endsWith(".weight") || shape.length < 2 || !weights.has(name.replace(/weight$/, "bias"))) continue;
      const layer = {inputs: shape[1], outputs: shape[0], size: shape[2] ?? 1, panels: Math.ceil(shape[0] / PANEL)};
      layer.weight = take(layer.panels * PANEL * layer.inputs * layer.size ** 2);
      layer.bias = take(layer.panels * PANEL);
      inputs = Math.max(inputs, layer.inputs);
      panels = Math.max(panels, layer.panels);
      this.layers.set(name.replace(/\.weight$/, ""), layer);
    }
    const positions = (height + 4) * (width + 2) + 16;  // padding, and rows beyond the end that are computed in vain
    this.input = take(positions * inputs);
    this.output = take(positions * panels * PANEL);
    this.multiply = this.allocate(end, wasm);
    for (const [name, layer] of this.layers)
      this.pack(layer, weights.get(`${name}.weight`), weights.get(`${name}.bias`));
  }

  // Make the memory; returns the matrix product that works in it.
  allocate(count, wasm) {
    if (!wasm) {
      this.floats = new Float32Array(count);
      return (...sizes) => multiplyPlain(this.floats, ...sizes);
    }
    const {memory, multiply} = new WebAssembly.Instance(new WebAssembly.Module(wasm)).exports;
    memory.grow(Math.ceil(count * 4 / 65536));
    this.floats = new Float32Array(memory.buffer);
    return (x, w, bias, out, rows, stride, run, runs, gap, panels) =>
      multiply(4 * x, 4 * w, 4 * bias, 4 * out, rows, 4 * stride, run, runs, 4 * gap, panels);
  }

  // (outputs, inputs, size, size) -> (panels, size, size, inputs, PANEL): in the order in which the product reads them.
  pack({inputs, outputs, size, weight, bias}, weights, biases) {
    for (let o = 0; o < outputs; o++) {
      const panel = weight + Math.floor(o / PANEL) * PANEL * inputs * size ** 2 + o % PANEL;
      for (let i = 0; i < inputs; i++)
        for (let k = 0; k < size ** 2; k++)
          this.floats[panel + (k * inputs + i) * PANEL] = weights.data[(o * inputs + i) * size ** 2 + k];
      this.floats[bias + o] = biases.data[o];
    }
  }

  // The layer `name` of a tensor x -> a tensor with `outputs` channels and 1 / stride of the height and width. x is
  // padded with zeros so that no pixel is lost.
  //
  // With pixels and channels in one row, the 3 × 3 window of an output is three runs of 3 · C numbers that lie side by
  // side: nothing is copied but the padding. The zero at the right of a row is also that at the left of the next.
  apply(name, x, stride = 1) {
    const {inputs, outputs, size, panels, weight, bias} = this.layers.get(name);
    const pad = size >> 1, width = x.width + pad, line = x.width * inputs, out = panels * PANEL;
    const input = this.floats.subarray(this.input, this.output);
    if (pad) input.fill(0, 0, ((x.height + 2) * width + 1) * inputs);
    for (let y = 0; y < x.height; y++)
      input.set(x.data.subarray(y * line, (y + 1) * line), ((y + pad) * width + pad) * inputs);
    const result = tensor(outputs, x.height / stride, x.width / stride);
    const rows = roundUp((result.height - 1) * width + result.width, 4);
    this.multiply(this.input, weight, bias, this.output, rows, stride * inputs, size * inputs, size, width * inputs,
                  panels);
    for (let y = 0, target = 0; y < result.height; y++)
      for (let x = 0; x < result.width; x++, target += outputs) {
        const pixel = this.output + (y * width + x) * out;
        result.data.set(this.floats.subarray(pixel, pixel + outputs), target);
      }
    return result;
  }
}

// What multiply.wat does, in JavaScript: out (rows, 8 · panels) = bias + windows of x (rows, runs · run) · w.
function multiplyPlain(floats, x, w, bias, out, rows, stride, run, runs, gap, panels) {
  for (let panel = 0; panel < panels; panel++, w += run * runs * PANEL, bias += PANEL)
    for (let row = 0; row < rows; row++)
      for (let half = 0; half < PANEL; half += 4) {
        let k = w + half, a = floats[bias + half], b = floats[bias + half + 1];
        let c = floats[bias + half + 2], d = floats[bias + half + 3];
        for (let r = 0, start = x + row * stride; r < runs; r++, start += gap)
          for (let i = start; i < start + run; i++, k += PANEL) {
            const value = floats[i];
            a += value * floats[k];
            b += value * floats[k + 1];
            c += value * floats[k + 2];
            d += value * floats[k + 3];
          }
        floats.set([a, b, c, d], out + (row * panels + panel) * PANEL + half);
      }
}
