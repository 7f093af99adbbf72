// The worker: it computes while the page stays free. A request is {id, slot, task, ...}; a newer one with the same slot
// overtakes an older one, which then stops after its current step.

const loaded = [];  // by the number of a model: {network, process, entry}

// The bytes of multiply.wasm where this browser can run them: some have no WebAssembly, or none with SIMD.
function runnable(bytes) { return typeof WebAssembly === "object" && WebAssembly.validate(bytes) ? bytes : null; }

// imageNoise of image 0 of a seed; the streams that were used last are kept, and so not computed again.
const STREAMS = 8, streams = new Map();
function noiseOf(seed, count) {
  const key = `${seed} ${count}`, {randn, drawn} = streams.get(key) ?? {randn: imageNoise(seed, 0, count), drawn: []};
  streams.delete(key);
  streams.set(key, {randn, drawn});
  if (streams.size > STREAMS) streams.delete(streams.keys().next().value);
  let next = 0;
  return () => drawn[next++] ??= randn();
}

// The trajectory of a job {label, sampler, steps, guidance, seed, towards, share}: image 0 of the seed, as sample.py
// makes it; or with noise, of the start and of all steps, that lies at `share` on the way from that of `seed` to that of
// `towards`.
function trajectory({network, process, entry}, {label, sampler, steps, guidance, seed, towards, share}) {
  const count = entry.shape.reduce((a, b) => a * b), own = noiseOf(seed, count);
  const other = share ? noiseOf(towards, count) : null, randn = share ? () => slerp(own(), other(), share) : own;
  const start = randn();
  const times = spacedTimesteps(process, steps, entry.samplers[sampler], entry.noise_range);
  const path = SAMPLERS[sampler](process.guided(network, label, guidance), start, times, process, randn);
  return {start, times, path};
}

// Each task yields what is sent to the page, piece by piece.
const TASKS = {
  * load({model, entry, weights, wasm}) {
    if (loaded[model]) return;
    const tensors = unpackWeights(entry.tensors, bytesOf(weights), entry.precision);
    loaded[model] = {
      entry, process: new DiffusionProcess(entry.diffusion, entry.alphas_cumprod),
      network: createModel(entry.network, tensors, entry.shape, wasm && runnable(bytesOf(wasm))),
    };
  },

  // To overtake another task.
  * nothing() {},

  // One image with all its steps.
  * make({model, job}) {
    const {start, times, path} = trajectory(loaded[model], job);
    yield {t: times[0], x: start, x0: null};
    for (const [t, x, x0] of path) yield {t, x, x0};
  },

  // Many images, without their steps.
  * many({model, jobs}) {
    for (const [index, job] of jobs.entries()) {
      let image;
      for (const [, x] of trajectory(loaded[model], job).path) {
        image = x;
        yield null;
      }
      yield {index, x: image};
    }
  },

  // A picture with noise, and what the network sees in it.
  * guess({model, x0, t, label, seed}) {
    const {network, process} = loaded[model], noise = noiseOf(seed, x0.length)();
    const x = process.addNoise(x0, t, noise);
    yield {x, x0: process.denoiser(network, label)(x, t)};
  },

  // Several ways to fill in a picture where mask is 1; proposal k has the noise of image k of the seed.
  * complete({model, known, mask, label, guidance, seed, steps, resample, count}) {
    const {network, process} = loaded[model], denoise = process.guided(network, label, guidance);
    const times = uniformTimesteps(process.numTimesteps, steps);
    const paths = Array.from({length: count}, (_, k) => {
      const randn = imageNoise(seed, k, known.length);
      return inpaint(denoise, randn(), times, process, randn, known, mask, resample);
    });
    for (let step = 1; step <= steps; step++)
      for (const [index, path] of paths.entries()) {
        const [, , x0] = path.next().value;
        yield {index, x: x0, share: step / steps};
      }
  },

  // The output of every block while the network looks at x_t: name -> tensor.
  * look({model, x, t, label}) {
    const {network, process} = loaded[model], tensors = {};
    process.denoiser(network, label, true, (name, tensor) => { tensors[name] = tensor; })(x, t);
    yield {tensors};
  },
};

function startWorker() {
  const newest = new Map(), waiting = [], {port1, port2} = new MessageChannel();
  port1.onmessage = () => waiting.shift()();
  const turn = () => new Promise((resolve) => {  // lets messages in
    waiting.push(resolve);
    port2.postMessage(null);
  });
  self.onmessage = async ({data: request}) => {
    const {id, slot, task} = request, overtaken = () => newest.get(slot) !== id;
    newest.set(slot, id);
    await turn();
    if (overtaken()) return;
    try {
      for (const part of TASKS[task](request)) {
        if (part) self.postMessage({id, part});
        await turn();
        if (overtaken()) return;
      }
      self.postMessage({id, done: true});
    } catch (error) {
      self.postMessage({id, error: String(error)});
    }
  };
}
