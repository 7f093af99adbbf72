// DiffusionProcess of diffusion.py, as far as sampling needs it. Images are Float32Arrays; t is a number from -1 up.

// target = a · x_0 + b · noise: (alpha, sigma, std) -> [a, b], as PREDICTIONS of diffusion.py.
const PREDICTIONS = {
  eps: () => [0, 1],
  x0: () => [1, 0],
  v: (alpha, sigma) => [-sigma, alpha],
  edm: (alpha, sigma, std) => {
    const scale = ((alpha * std) ** 2 + sigma ** 2) ** -0.5;
    return [sigma / std * scale, -alpha * std * scale];
  },
};

const sigmoid = (x) => 1 / (1 + Math.exp(-x));

// a · x + b · y of two images.
const mix = (a, x, b, y) => x.map((value, i) => a * value + b * y[i]);

class DiffusionProcess {
  constructor({prediction, data_std: std}, alphasCumprod) {
    Object.assign(this, {prediction, std, alphasCumprod, numTimesteps: alphasCumprod.length});
    this.table = [Infinity, ...alphasCumprod.map((value) => Math.log(value / (1 - value)))];  // entry t + 1: time t
  }

  // lambda_t = log(alpha_t² / sigma_t²), interpolated between whole times.
  logSnr(t) {
    const below = Math.floor(t), weight = t - below, [low, high] = [this.table[below + 1], this.table[below + 2]];
    return weight ? low + weight * (high - low) : low;
  }

  alpha(t) { return Math.sqrt(sigmoid(this.logSnr(t))); }
  sigma(t) { return Math.sqrt(sigmoid(-this.logSnr(t))); }

  // The real time in 0..T-1 at which lambda_t has this value.
  timeOf(logSnr) {
    const last = this.numTimesteps - 1;
    if (logSnr >= this.table[1]) return 0;
    let t = 0;
    while (t < last && this.table[t + 2] > logSnr) t++;
    return t === last ? last : t + (this.table[t + 1] - logSnr) / (this.table[t + 1] - this.table[t + 2]);
  }

  addNoise(x0, t, noise) { return mix(this.alpha(t), x0, this.sigma(t), noise); }

  // denoise(x_t, t) -> x_0_hat: what the network expects the clean image to be.
  denoiser(model, label, clip = true, watch = undefined) {
    return (x, t) => {
      const alpha = this.alpha(t), sigma = this.sigma(t);
      const [a, b] = PREDICTIONS[this.prediction](alpha, sigma, this.std), scale = alpha * b - sigma * a;
      const size = this.prediction === "edm" ? Math.fround(((alpha * this.std) ** 2 + sigma ** 2) ** -0.5) : 1;
      const output = model(x.map((value) => value * size), t, label, watch).subarray(0, x.length);
      const x0 = mix(b / scale, x, -sigma / scale, output);
      return clip ? clamp(x0) : x0;
    };
  }

  // Classifier-free guidance, as `guide` of samplers.py.
  guided(model, label, scale) {
    if (label === null || scale === 1) return this.denoiser(model, label);
    const [conditional, unconditional] = [label, null].map((each) => this.denoiser(model, each, false));
    return (x, t) => clamp(mix(scale, conditional(x, t), 1 - scale, unconditional(x, t)));
  }

  // [mean, variance] of q(x_s | x_t, x_0_hat).
  posterior(x, x0, t, s) {
    const rest = -Math.expm1(this.logSnr(t) - this.logSnr(s));
    const keep = this.alpha(t) * this.sigma(s) ** 2 / (this.alpha(s) * this.sigma(t) ** 2);
    return [mix(keep, x, this.alpha(s) * rest, x0), this.sigma(s) ** 2 * rest];
  }
}

const clamp = (x) => x.map((value) => Math.min(1, Math.max(-1, value)));
