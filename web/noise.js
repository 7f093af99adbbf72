// The noise of samplers.image_noise: NumPy's generator Philox, bit for bit, and its normal numbers, of which one in
// thousands, far out in the tail, differs in its last digit.

// Philox4x64-10 (Salmon et al. 2011): uint32() -> the next 32 random bits of the stream with this key.
function philox(...key) {
  const MASK = 2n ** 64n - 1n, FACTORS = [0xD2E7470EE14C6C93n, 0xCA5A826395121157n];
  const WEYL = [0x9E3779B97F4A7C15n, 0xBB67AE8584CAA73Bn];
  let counter = 0n, words = [];
  function block() {
    let [a, b, c, d] = [++counter, 0n, 0n, 0n], [k, l] = key.map(BigInt);
    for (let round = 0; round < 10; round++) {
      const [low, high] = [FACTORS[0] * a, FACTORS[1] * c];
      [a, b, c, d] = [(high >> 64n) ^ b ^ k, high & MASK, (low >> 64n) ^ d ^ l, low & MASK];
      [k, l] = [(k + WEYL[0]) & MASK, (l + WEYL[1]) & MASK];
    }
    return [a, b, c, d].flatMap((word) => [Number(word & 0xFFFFFFFFn), Number(word >> 32n)]);
  }
  return () => {
    if (!words.length) words = block();
    return words.shift();
  };
}

// The ziggurat: exp(-x²/2) covered by 256 layers of the same area (Marsaglia and Tsang 2000). EDGES[i] is the right
// edge of layer i from the top, i from 1; that of 255 is TAIL. Layer 0 is the lowest, with the tail beyond TAIL.
const TAIL = 3.6541528853610088, AREA = 0.004928673233974655;
const EDGES = [TAIL];
while (EDGES.length < 255) EDGES.unshift(Math.sqrt(-2 * Math.log(AREA / EDGES[0] + Math.exp(-(EDGES[0] ** 2) / 2))));
EDGES.unshift(AREA * Math.exp(TAIL ** 2 / 2));
const SCALES = EDGES.map((edge) => Math.fround(edge / 2 ** 23));
const INSIDE = EDGES.map((edge, i) => i === 1 ? 0 : Math.floor(EDGES.at(i - 1) / edge * 2 ** 23));
const HEIGHTS = EDGES.map((edge, i) => i ? Math.fround(Math.exp(-(edge ** 2) / 2)) : 1);

// A function randn() -> Float32Array: the next `count` normal numbers of image k of a seed.
function imageNoise(seed, k, count) {
  const uint32 = philox(seed, k), uniform = () => (uint32() >>> 8) / 2 ** 24;
  const log1p = (x) => Math.fround(Math.log1p(x));
  function normal() {
    for (;;) {
      const bits = uint32(), layer = bits & 0xFF, size = bits >>> 9, sign = bits & 0x100 ? -1 : 1;
      const x = Math.fround(sign * Math.fround(size * SCALES[layer]));
      if (size < INSIDE[layer]) return x;
      if (layer) {
        const height = Math.fround(Math.fround((HEIGHTS[layer - 1] - HEIGHTS[layer]) * uniform()) + HEIGHTS[layer]);
        if (height < Math.exp(-0.5 * x * x)) return x;
      } else {
        for (;;) {
          const beyond = Math.fround(Math.fround(-1 / TAIL) * log1p(-uniform())), y = -log1p(-uniform());
          if (y + y > beyond * beyond) return Math.fround((size >>> 8) & 1 ? -(TAIL + beyond) : TAIL + beyond);
        }
      }
    }
  }
  return () => Float32Array.from({length: count}, normal);
}
