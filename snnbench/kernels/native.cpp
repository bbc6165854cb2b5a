// Fused normalisation + residual + LIF over all timesteps, for CPUs: plain C++ without torch.
//
// Arrays are contiguous [T, M, C]: M batch x pixels, C channels (the channels-last layout).  `y` has
// a time stride of 0 where the input is the same at every timestep.  With the membrane v, from 0:
//
//     x     = a * y + b + (ra * rest + rb)     per channel; 1 and 0 without normalisation
//     v_pre = decay * v + gain * x
//     s     = v_pre - v_th >= 0                (> 0: strict)
//     v     = v_pre - drop * s                 (soft)   or   v_pre * (1 - s)   (hard)
//
// Memory is walked in segments of whole rows (or of a part of one long row), short enough that the
// membranes of all timesteps stay in the first-level cache.  Sums are taken per thread, in double,
// and added in the order of the threads: the same bits at every call.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t WIDTH = 256;  // elements of a segment, at most
constexpr int64_t ROUNDS = 16;  // of sums in float before they are added to those in double

struct Neuron {
  float decay, gain, v_th, drop;
  int32_t hard, detach, strict, decay_input, learn_decay, surrogate;
  float shape;  // width, slope or height of the surrogate
};

// Segments of [M, C]: up to `rows` rows each, or parts of a row where C is long.
struct Walk {
  int64_t M, C, rows, parts, count, tile;
  Walk(int64_t M, int64_t C) : M(M), C(C) {
    rows = std::max<int64_t>(1, WIDTH / C);
    parts = (C + WIDTH - 1) / WIDTH;
    tile = rows * C;  // per-channel constants are repeated this far
    count = (M + rows - 1) / rows * parts;
  }
  void at(int64_t i, int64_t& offset, int64_t& channel, int64_t& length) const {
    const int64_t row = i / parts * rows;
    channel = i % parts * WIDTH;
    offset = row * C + channel;
    length = parts > 1 ? std::min(WIDTH, C - channel) : std::min(rows, M - row) * C;
  }
};

std::vector<float> tiled(const float* values, const Walk& w, float otherwise) {
  std::vector<float> out(w.tile, otherwise);
  for (int64_t row = 0; values && row < w.rows; ++row)
    std::copy(values, values + w.C, out.begin() + row * w.C);
  return out;
}

// Rows of per-thread sums over a tile, folded to channels in a fixed order.
struct Sums {
  int64_t threads, tile, C;
  std::vector<double> data;
  Sums(int64_t threads, const Walk& w) : threads(threads), tile(w.tile), C(w.C), data(threads * w.tile) {}
  double* of(int64_t thread) { return data.data() + thread * tile; }
  std::vector<double> folded() const {
    std::vector<double> out(C);
    for (auto row = data.begin(); row != data.end(); row += C)
      for (int64_t c = 0; c < C; ++c) out[c] += row[c];
    return out;
  }
};

template <class F>
void parallel(int64_t threads, int64_t count, F&& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      // All chunks are done even if the runtime gives fewer threads than asked for.
      for (int64_t id = omp_get_thread_num(); id < threads; id += omp_get_num_threads())
        body(id, count * id / threads, count * (id + 1) / threads);
    }
    return;
  }
#endif
  for (int64_t id = 0; id < threads; ++id)
    body(id, count * id / threads, count * (id + 1) / threads);
}

// exp without a branch, within 2 ulp of float on [-87, 87]; NaN stays NaN.
inline float exp_(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 87.f ? 87.f : x;
  const float n = std::floor(x * 1.44269504f + 0.5f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n == n ? n : 0.f) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// Surrogate derivative at u = v_pre - v_th; the kinds stand in native.py.
template <int KIND>
inline float slope(float u, float p) {
  if (KIND == 0) {  // triangle
    const float left = p - std::fabs(u);
    return (left < 0.f ? 0.f : left) * (1.f / (p * p));
  }
  if (KIND == 1) return (std::fabs(u) < p / 2 ? 1.f : 0.f) * (1.f / p);  // rectangle
  if (KIND == 2) {  // sigmoid
    const float q = 1.f / (1.f + exp_(-p * u));
    return p * q * (1.f - q);
  }
  if (KIND == 3) {  // atan
    const float z = 1.57079632679f * p * u;
    return p / 2 / (1.f + z * z);
  }
  const float e = exp_(-2.f * std::fabs(u));  // 1 - tanh(u)^2 = 4 e / (1 + e)^2
  return p * 4.f * e / ((1.f + e) * (1.f + e));
}

// What u = v_pre - v_th has to reach for a spike: no difference of floats lies between 0 and this.
inline float bar(const Neuron& n) { return n.strict ? std::numeric_limits<float>::min() : 0.f; }

inline float spike(float u, float bar) {
  return (u >= bar ? 1.f : 0.f) + 0.f * u;  // a membrane that is not finite never passes as silent
}

// y, and what is added to it; their scales and shifts are given for both or only for y.
struct Input {
  const float *y, *rest, *a, *b, *ra, *rb;
  int64_t stride_y, stride;
};

// The constants of an input, once for each element of a tile.
struct Scales {
  std::vector<float> a, b, ra, rb;
  Scales(const Input& in, const Walk& w)
      : a(tiled(in.a, w, 1.f)), b(tiled(in.b, w, 0.f)), ra(tiled(in.ra, w, 1.f)),
        rb(tiled(in.rb, w, 0.f)) {}
};

enum Rest { NONE, PLAIN, NORMED };

Rest kind_of(const Input& in) { return !in.rest ? NONE : in.ra ? NORMED : PLAIN; }

template <Rest REST>
inline float current(float y, float r, float a, float b, float ra, float rb) {
  float x = y * a + b;
  if (REST == PLAIN) x = x + r;
  if (REST == NORMED) x = x + (r * ra + rb);
  return x;
}

// v = v_pre - f (hard v_pre + soft), given a spike f; its derivative has the surrogate's slope d too
// unless the reset is detached.
struct Reset {
  float hard, soft, through_hard, through_soft;
  explicit Reset(const Neuron& n)
      : hard(n.hard ? 1.f : 0.f), soft(n.hard ? 0.f : n.drop),
        through_hard(n.detach ? 0.f : hard), through_soft(n.detach ? 0.f : soft) {}
  float after(float v_pre, float f) const { return v_pre - f * (hard * v_pre + soft); }
  template <bool DETACH>  // true where the loop knows it when it is compiled, which is faster
  float kept(float v_pre, float f, float d) const {
    const float keep = 1.f - hard * f;
    return DETACH ? keep : keep - (through_hard * v_pre + through_soft) * d;
  }
};

// What f makes of the neuron's surrogate as a constant: loops know it when they are compiled.
template <class F>
auto with_surrogate(const Neuron& n, F&& f) {
  return n.surrogate == 0   ? f(std::integral_constant<int, 0>())
         : n.surrogate == 1 ? f(std::integral_constant<int, 1>())
         : n.surrogate == 2 ? f(std::integral_constant<int, 2>())
         : n.surrogate == 3 ? f(std::integral_constant<int, 3>())
                            : f(std::integral_constant<int, 4>());
}

// One timestep of a segment: v_pre into `h`, spikes into `s`, the membrane `v` moves on.
template <Rest REST>
void step_(const Neuron& n, const float* __restrict y, const float* __restrict r,
           const float* __restrict a, const float* __restrict b, const float* __restrict ra,
           const float* __restrict rb, int64_t length, float* __restrict v, float* __restrict h,
           float* __restrict s) {
  const float decay = n.decay, gain = n.gain, th = n.v_th, lowest = bar(n);
  const Reset reset(n);
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    const float x = current<REST>(y[i], REST == NONE ? 0.f : r[i], a[i], b[i], ra[i], rb[i]);
    h[i] = decay * v[i] + gain * x;
    s[i] = spike(h[i] - th, lowest);
    v[i] = reset.after(h[i], s[i]);
  }
}

void step(const Input& in, const Neuron& n, const Scales& by, int64_t t, int64_t offset,
          int64_t channel, int64_t length, float* v, float* h, float* s) {
  const float* y = in.y + t * in.stride_y + offset;
  const float* r = in.rest ? in.rest + t * in.stride + offset : nullptr;
  const Rest rest = kind_of(in);
  const auto one = rest == NONE ? step_<NONE> : rest == PLAIN ? step_<PLAIN> : step_<NORMED>;
  one(n, y, r, &by.a[channel], &by.b[channel], &by.ra[channel], &by.rb[channel], length, v, h, s);
}

struct Grads {
  const float *g, *g2, *mean, *rstd, *rmean, *rrstd;
  float *gy, *grest, *dweight, *dbias, *drweight, *ddecay;
};

// What a walk back writes to, at an element of a tile: sums in double, of G, G (y - mean),
// G (rest - rmean) and of the decay's gradient, G being the gradient of x.
struct Totals {
  double *g, *gx, *gr, *d;
};

// Where a segment begins, and what holds for it: a shift of each pointer of the whole.
struct Segment {
  const float *y, *rest, *g, *g2, *a, *b, *ra, *rb, *mu, *rmu, *rstd;
  int64_t stride_y, stride, stride_2, stride_to, length;
  float *to, *sum;  // G of every timestep, and its sum over time where that is wanted
  Totals totals;
};

// A segment through T timesteps and back, with all membranes in registers: caches hold few lines
// that lie a power of two apart, as those of two timesteps often do.
template <int KIND, Rest REST, int T>
void back_T(const Neuron& n, const Segment& seg) {
  const float decay = n.decay, gain = n.gain, th = n.v_th, p = n.shape, lowest = bar(n);
  const Reset reset(n);
  const float *__restrict y = seg.y, *__restrict r = seg.rest, *__restrict g = seg.g;
  const float *__restrict g2 = seg.g2, *__restrict a = seg.a, *__restrict b = seg.b;
  const float *__restrict ra = seg.ra, *__restrict rb = seg.rb, *__restrict mu = seg.mu;
  const float* __restrict rmu = seg.rmu;
  float *__restrict to = seg.to, *__restrict sum = seg.sum;
  double *__restrict dg = seg.totals.g, *__restrict dx = seg.totals.gx;
  double* __restrict dr = seg.totals.gr;
  const int64_t sy = seg.stride_y, st = seg.stride, s2 = seg.stride_2, so = seg.stride_to;
#pragma omp simd
  for (int64_t i = 0; i < seg.length; ++i) {
    float h[T], y_[T], r_[T], v = 0.f, gv = 0.f, sum_g = 0.f, sum_gx = 0.f, sum_gr = 0.f;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      y_[t] = y[t * sy + i];
      r_[t] = REST == NONE ? 0.f : r[t * st + i];
      h[t] = decay * v + gain * current<REST>(y_[t], r_[t], a[i], b[i], ra[i], rb[i]);
      v = reset.after(h[t], spike(h[t] - th, lowest));
    }
#pragma GCC unroll 8
    for (int t = T - 1; t >= 0; --t) {
      const float d = slope<KIND>(h[t] - th, p);
      const float f = spike(h[t] - th, lowest);
      const float keep = reset.kept<false>(h[t], f, d);
      const float now = (g[t * st + i] + g2[t * s2 + i]) * d + gv * keep, x = gain * now;
      gv = decay * now;
      to[t * so + i] = x;
      sum_g += x;
      sum_gx += x * (y_[t] - mu[i]);
      if (REST == NORMED) sum_gr += x * (r_[t] - rmu[i]);
    }
    sum[i] = sum_g;
    dg[i] += sum_g;
    dx[i] += sum_gx;
    if (REST == NORMED) dr[i] += sum_gr;
  }
}

template <int KIND, Rest REST>
constexpr auto back_for(int64_t T) {
  return T == 2 ? back_T<KIND, REST, 2> : T == 4 ? back_T<KIND, REST, 4> : nullptr;
}

template <int KIND>
constexpr auto back_for(Rest rest, int64_t T) {
  return rest == NONE ? back_for<KIND, NONE>(T)
         : rest == PLAIN ? back_for<KIND, PLAIN>(T)
                         : back_for<KIND, NORMED>(T);
}

// The instance for a neuron and T, or null where there is none.
auto back_for(const Neuron& n, Rest rest, int64_t T) {
  const auto of = [&](auto kind) { return back_for<decltype(kind)::value>(rest, T); };
  return n.learn_decay ? nullptr : with_surrogate(n, of);
}

// One timestep back: the gradient gx of the input current, and sums of it.
template <int KIND>
void back_(const Neuron& n, const float* __restrict h, const float* __restrict s,
           const float* __restrict g, const float* __restrict g2, const float* __restrict y,
           const float* __restrict mu, int64_t length, float* __restrict gv, float* __restrict gx,
           float* __restrict sum_g, float* __restrict sum_gx) {
  const float decay = n.decay, gain = n.gain, th = n.v_th, p = n.shape;
  const Reset reset(n);
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    const float d = slope<KIND>(h[i] - th, p);
    const float now = (g[i] + g2[i]) * d + gv[i] * reset.kept<false>(h[i], s[i], d);
    const float x = gain * now;
    gv[i] = decay * now;
    gx[i] = x;
    sum_g[i] += x;
    sum_gx[i] += x * (y[i] - mu[i]);
  }
}

// A segment back for any T, and for a learned decay.
struct Walked {
  std::vector<float> h, s, v;
  explicit Walked(int64_t T) : h(T * WIDTH), s(T * WIDTH), v(T * WIDTH) {}

  void back(const Input& in, const Neuron& n, const Scales& by, const Segment& seg, int64_t T,
            int64_t offset, int64_t channel) {
    const int64_t length = seg.length;
    float gv[WIDTH] = {}, sum_gx[WIDTH] = {}, sum_gr[WIDTH] = {}, at[WIDTH] = {};
    for (int64_t t = 0; t < T; ++t) {
      step(in, n, by, t, offset, channel, length, at, &h[t * WIDTH], &s[t * WIDTH]);
      std::copy(at, at + length, &v[t * WIDTH]);
    }
    std::fill(seg.sum, seg.sum + length, 0.f);
    const auto one = with_surrogate(n, [](auto kind) { return back_<decltype(kind)::value>; });
    for (int64_t t = T - 1; t >= 0; --t) {
      const float* y = seg.y + t * seg.stride_y;
      const float* r = seg.rest ? seg.rest + t * seg.stride : nullptr;
      float* gx = seg.to + t * seg.stride_to;
      one(n, &h[t * WIDTH], &s[t * WIDTH], seg.g + t * seg.stride, seg.g2 + t * seg.stride_2, y,
          seg.mu, length, gv, gx, seg.sum, sum_gx);
      for (int64_t i = 0; in.ra && i < length; ++i) sum_gr[i] += gx[i] * (r[i] - seg.rmu[i]);
      for (int64_t i = 0; n.learn_decay && i < length; ++i) {
        const float held = t > 0 ? v[(t - 1) * WIDTH + i] : 0.f;
        float x = n.decay_input ? y[i] * seg.a[i] + seg.b[i] : 0.f;
        if (n.decay_input && r) x = x + (r[i] * seg.ra[i] + seg.rb[i]);
        seg.totals.d[i] += gx[i] / n.gain * (held + x);
      }
    }
    for (int64_t i = 0; i < length; ++i) {
      seg.totals.g[i] += seg.sum[i];
      seg.totals.gx[i] += sum_gx[i];
      seg.totals.gr[i] += sum_gr[i];
    }
  }
};

// What a walk onward makes: spikes; of the time-means rate, eligibility and normalised input.
struct Made {
  float *s, *rate, *elig, *xhat;
};

constexpr int NO_MEANS = -1;  // in place of a surrogate
constexpr int LANES = 64;     // elements that go through all timesteps together

// LANES elements, or all that are left, from i on; rho is the sensitivity of v_pre to the currents.
template <int KIND, Rest REST, bool DETACH, bool WHOLE>
void onward_(const Neuron& n, const Segment& seg, const Made& out, int64_t T, int64_t i) {
  const int length = WHOLE ? LANES : static_cast<int>(seg.length - i);
  constexpr bool MEANS = KIND != NO_MEANS;
  const float decay = n.decay, gain = n.gain, th = n.v_th, p = n.shape, lowest = bar(n);
  const Reset reset(n);
  const float *__restrict a = seg.a + i, *__restrict b = seg.b + i;
  const float *__restrict ra = seg.ra + i, *__restrict rb = seg.rb + i;
  float v[LANES] = {}, elig[LANES] = {}, fired[LANES] = {}, drive[LANES] = {}, rho[LANES];
  std::fill(rho, rho + LANES, gain);
  for (int64_t t = 0; t < T; ++t) {
    const float* __restrict y = seg.y + t * seg.stride_y + i;
    const float* __restrict r = REST == NONE ? nullptr : seg.rest + t * seg.stride + i;
    float* __restrict s = out.s + t * seg.stride + i;
#pragma omp simd
    for (int j = 0; j < length; ++j) {
      const float x = current<REST>(y[j], REST == NONE ? 0.f : r[j], a[j], b[j], ra[j], rb[j]);
      const float h = decay * v[j] + gain * x, f = spike(h - th, lowest);
      s[j] = f;
      v[j] = reset.after(h, f);
      if (!MEANS) continue;
      const float d = slope<KIND>(h - th, p);
      fired[j] += f;
      drive[j] += y[j];
      elig[j] += d * rho[j];
      rho[j] = gain + decay * reset.kept<DETACH>(h, f, d) * rho[j];
    }
  }
  if (!MEANS) return;
  const float share = 1.f / static_cast<float>(T);
  for (int j = 0; j < length; ++j) {
    out.rate[i + j] = fired[j] * share;
    out.elig[i + j] = elig[j] * share;
  }
  if (!out.xhat) return;
  const float *__restrict mu = seg.mu + i, *__restrict rstd = seg.rstd + i;
  for (int j = 0; j < length; ++j) out.xhat[i + j] = (drive[j] * share - mu[j]) * rstd[j];
}

template <int KIND, Rest REST, bool DETACH>
void onward(const Neuron& n, const Segment& seg, const Made& out, int64_t T) {
  int64_t i = 0;
  for (; i + LANES <= seg.length; i += LANES) onward_<KIND, REST, DETACH, true>(n, seg, out, T, i);
  if (i < seg.length) onward_<KIND, REST, DETACH, false>(n, seg, out, T, i);
}

template <int KIND>
auto onward_for(const Neuron& n, Rest rest) {
  return n.detach ? (rest == NONE ? onward<KIND, NONE, true> : onward<KIND, PLAIN, true>)
                  : (rest == NONE ? onward<KIND, NONE, false> : onward<KIND, PLAIN, false>);
}

// Spikes, and time-means where they are wanted, of the input's normalisation to mean and rstd.
void fire(const Input& in, const Neuron& n, int64_t T, int64_t M, int64_t C, const float* mean,
          const float* rstd, const Made& out, int64_t threads) {
  const Walk w(M, C);
  const Scales by(in, w);
  const auto mu = tiled(mean, w, 0.f), rs = tiled(rstd, w, 1.f);
  const Rest rest = kind_of(in);
  const auto means = [&](auto kind) { return onward_for<decltype(kind)::value>(n, rest); };
  const auto one = out.rate        ? with_surrogate(n, means)
                   : rest == NONE  ? onward<NO_MEANS, NONE, true>
                   : rest == PLAIN ? onward<NO_MEANS, PLAIN, true>
                                   : onward<NO_MEANS, NORMED, true>;
  parallel(threads, w.count, [&](int64_t, int64_t begin, int64_t end) {
    int64_t at, channel, length;
    for (int64_t i = begin; i < end; ++i) {
      w.at(i, at, channel, length);
      Segment seg{};
      seg.y = in.y + at, seg.rest = in.rest ? in.rest + at : nullptr;
      seg.a = &by.a[channel], seg.b = &by.b[channel];
      seg.ra = &by.ra[channel], seg.rb = &by.rb[channel];
      seg.mu = &mu[channel], seg.rstd = &rs[channel];
      seg.stride_y = in.stride_y, seg.stride = in.stride, seg.length = length;
      const auto from = [at](float* whole) { return whole ? whole + at : nullptr; };
      one(n, seg, {from(out.s), from(out.rate), from(out.elig), from(out.xhat)}, T);
    }
  });
}

// Gradient of the scale of a normalisation, and what its statistics take off the gradient of z:
// gz = a (G - k0 - (z - mean) k1), of sums of G and G (z - mean) over `count` values a channel.
struct Share {
  std::vector<float> k0, k1;
  Share(const std::vector<double>& g, const std::vector<double>& gz, const float* rstd,
        float* dweight, double count, const Walk& w) {
    std::vector<float> zero(w.C), one(w.C);
    for (int64_t c = 0; c < w.C; ++c) {
      const double scaled = gz[c] * rstd[c];  // the sum of G zhat
      dweight[c] = static_cast<float>(scaled);
      zero[c] = count ? static_cast<float>(g[c] / count) : 0.f;
      one[c] = count ? static_cast<float>(scaled * rstd[c] / count) : 0.f;
    }
    k0 = tiled(zero.data(), w, 0.f);
    k1 = tiled(one.data(), w, 0.f);
  }
};

void centre(const float* G, const float* __restrict z, const float* __restrict a,
            const float* __restrict mu, const float* __restrict k0, const float* __restrict k1,
            int64_t length, float* gz) {  // gz may be G: element i is read before it is written
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) gz[i] = a[i] * (G[i] - k0[i] - (z[i] - mu[i]) * k1[i]);
}

void backward(const Input& in, const Neuron& n, int64_t T, int64_t M, int64_t C, const Grads& out,
              bool batch_stats, int64_t threads) {
  const Walk w(M, C);
  const bool once = in.stride_y == 0 && T > 1, learn = n.learn_decay;
  const Scales by(in, w);
  const auto mean = tiled(out.mean, w, 0.f), rmean = tiled(out.rmean, w, 0.f);
  Sums sum_g(threads, w), sum_gx(threads, w), sum_gr(threads, w), sum_d(threads, w);
  // With a residual the input's gradient has a place of its own; else it waits where gy will stand.
  float* place = in.rest ? out.grest : once ? nullptr : out.gy;
  const auto back = back_for(n, kind_of(in), T);
  parallel(threads, w.count, [&](int64_t id, int64_t begin, int64_t end) {
    Walked walked(back ? 0 : T);
    std::vector<float> silent(WIDTH), unused(WIDTH), summed(WIDTH);
    int64_t offset, channel, length;
    for (int64_t i = begin; i < end; ++i) {
      w.at(i, offset, channel, length);
      const Totals totals{sum_g.of(id) + channel, sum_gx.of(id) + channel, sum_gr.of(id) + channel,
                          sum_d.of(id) + channel};
      const Segment seg{in.y + offset, in.rest ? in.rest + offset : nullptr, out.g + offset,
                        out.g2 ? out.g2 + offset : silent.data(), &by.a[channel], &by.b[channel],
                        &by.ra[channel], &by.rb[channel], &mean[channel], &rmean[channel],
                        nullptr, in.stride_y, in.stride, out.g2 ? in.stride : 0, place ? in.stride : 0,
                        length, place ? place + offset : unused.data(),
                        once ? out.gy + offset : summed.data(), totals};
      back ? back(n, seg) : walked.back(in, n, by, seg, T, offset, channel);
    }
  });
  if (learn) {
    double total = 0;
    for (double part : sum_d.folded()) total += part;
    out.ddecay[0] = static_cast<float>(total);
  }
  if (!in.a) return;
  const auto g = sum_g.folded();
  const int64_t Ty = once ? 1 : T;
  for (int64_t c = 0; c < C; ++c) out.dbias[c] = static_cast<float>(g[c]);
  const Share of_y(g, sum_gx.folded(), out.rstd, out.dweight, batch_stats ? Ty * M : 0, w);
  std::vector<double> none(C);
  std::vector<float> unused(C);
  const Share of_rest(g, in.ra ? sum_gr.folded() : none, in.ra ? out.rrstd : unused.data(),
                      in.ra ? out.drweight : unused.data(), batch_stats ? T * M : 0, w);
  const float* from = in.rest && !once ? out.grest : out.gy;
  parallel(threads, w.count, [&](int64_t, int64_t begin, int64_t end) {
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      for (int64_t t = 0; t < Ty; ++t) {
        const int64_t at = t * in.stride + offset;
        centre(from + at, in.y + t * in.stride_y + offset, &by.a[channel], &mean[channel],
               &of_y.k0[channel], &of_y.k1[channel], length, out.gy + at);
      }
      for (int64_t t = 0; in.ra && t < T; ++t) {
        const int64_t at = t * in.stride + offset;
        centre(out.grest + at, in.rest + at, &by.ra[channel], &rmean[channel],
               &of_rest.k0[channel], &of_rest.k1[channel], length, out.grest + at);
      }
    }
  });
}

// Biased variance and mean of every channel of y [N, C].
void moments(const float* y, int64_t N, int64_t C, float* mean, float* var, int64_t threads) {
  const Walk w(N, C);
  const auto shift = tiled(y, w, 0.f);  // the first row: keeps the squares small
  Sums sum(threads, w), squares(threads, w);
  parallel(threads, w.count, [&](int64_t id, int64_t begin, int64_t end) {
    std::vector<float> few(2 * w.tile);
    float *f = few.data(), *f2 = f + w.tile;
    double *s = sum.of(id), *q = squares.of(id);
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      const float *x = y + offset, *m = &shift[channel];
      float *__restrict here = f + channel, *__restrict here2 = f2 + channel;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        const float d = x[i] - m[i];
        here[i] += d;
        here2[i] += d * d;
      }
      if ((seg - begin) % (ROUNDS * w.parts) != ROUNDS * w.parts - 1 && seg + 1 < end) continue;
#pragma omp simd
      for (int64_t i = 0; i < w.tile; ++i) {
        s[i] += f[i];
        q[i] += f2[i];
        f[i] = f2[i] = 0.f;
      }
    }
  });
  const auto s = sum.folded(), q = squares.folded();
  for (int64_t c = 0; c < C; ++c) {
    const double d = s[c] / N, v = q[c] / N - d * d;
    mean[c] = static_cast<float>(d + y[c]);
    var[c] = static_cast<float>(v < 0 ? 0 : v);
  }
}

struct Norm {
  const float *weight, *bias;
  float *mean, *var;  // running ones, or none
  float eps, share;   // share of a batch in the running ones; 0 leaves them
  float unbiased;     // by which its variance is multiplied for them
  int32_t batch_stats;
};

// Normalisation by a batch y [N, C], or by the running statistics: a, b, mean, rstd, each [C].
void affine(const float* y, const Norm& norm, int64_t N, int64_t C, float* out, int64_t threads) {
  float *a = out, *b = out + C, *mean = out + 2 * C, *rstd = out + 3 * C;
  if (norm.batch_stats) {
    moments(y, N, C, mean, rstd, threads);
  } else {
    std::copy(norm.mean, norm.mean + C, mean);
    std::copy(norm.var, norm.var + C, rstd);
  }
  for (int64_t c = 0; c < C; ++c) {
    if (norm.share != 0.f) {
      norm.mean[c] += norm.share * (mean[c] - norm.mean[c]);
      norm.var[c] += norm.share * (rstd[c] * norm.unbiased - norm.var[c]);
    }
    rstd[c] = 1.f / std::sqrt(rstd[c] + norm.eps);
    a[c] = norm.weight[c] * rstd[c];
    b[c] = norm.bias[c] - a[c] * mean[c];
  }
}

struct MeanGrads {
  float *gc, *gz, *dweight, *dbias;
};

// Gradients of time-means [M, C]: gz of the normalised input, gc of the input itself.
void rate_backward(const float* g, const float* elig, const float* xhat, const float* a, int64_t M,
                   int64_t C, const MeanGrads& out, bool batch_stats, int64_t threads) {
  const Walk w(M, C);
  const auto A = tiled(a, w, 1.f), none = tiled(nullptr, w, 0.f);
  Sums sum_g(threads, w), sum_gx(threads, w);
  float* place = out.gz ? out.gz : out.gc;
  parallel(threads, w.count, [&](int64_t id, int64_t begin, int64_t end) {
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      const float *from = g + offset, *e = elig + offset, *x = (xhat ? xhat : elig) + offset;
      double *__restrict s = sum_g.of(id) + channel, *__restrict q = sum_gx.of(id) + channel;
      float* to = place + offset;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        const float z = from[i] * e[i];
        to[i] = z;
        s[i] += z;
        q[i] += z * x[i];
      }
    }
  });
  if (!xhat) return;
  const std::vector<float> one(C, 1.f);
  const auto sums = sum_g.folded();
  for (int64_t c = 0; c < C; ++c) out.dbias[c] = static_cast<float>(sums[c]);
  const Share of(sums, sum_gx.folded(), one.data(), out.dweight, batch_stats ? M : 0, w);
  parallel(threads, w.count, [&](int64_t, int64_t begin, int64_t end) {
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      centre(place + offset, xhat + offset, &A[channel], &none[channel], &of.k0[channel],
             &of.k1[channel], length, out.gc + offset);
    }
  });
}

// Means of k x k windows, of x [rows k, w k, C]: in torch's order, so with the same bits.
void average(const float* x, int64_t rows, int64_t w, int64_t C, int64_t k, float* out,
             int64_t threads) {
  const float windows = static_cast<float>(k * k);
  parallel(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin * w; i < end * w; ++i) {
      const float* __restrict from = x + (i / w * k * w + i % w) * k * C;
      float* __restrict to = out + i * C;
      if (k == 2) {
        const float* __restrict below = from + 2 * w * C;
#pragma omp simd
        for (int64_t c = 0; c < C; ++c)
          to[c] = (((from[c] + from[C + c]) + below[c]) + below[C + c]) / windows;
        continue;
      }
      std::fill(to, to + C, 0.f);
      for (int64_t a = 0; a < k; ++a)
        for (int64_t b = 0; b < k * C; b += C)
#pragma omp simd
          for (int64_t c = 0; c < C; ++c) to[c] += from[a * k * w * C + b + c];
      for (int64_t c = 0; c < C; ++c) to[c] /= windows;
    }
  });
}

void average_backward(const float* g, int64_t rows, int64_t w, int64_t C, int64_t k, float* out,
                      int64_t threads) {
  const float windows = static_cast<float>(k * k);
  parallel(threads, rows, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t a = 0; a < k; ++a)
        for (int64_t j = 0; j < w; ++j) {
          const float* __restrict from = g + (i * w + j) * C;
          float* __restrict to = out + ((i * k + a) * w + j) * k * C;
          for (int64_t b = 0; b < k * C; b += C)
#pragma omp simd
            for (int64_t c = 0; c < C; ++c) to[b + c] = from[c] / windows;
        }
  });
}

}  // namespace

extern "C" {

void snn_stats(const float* y, int64_t N, int64_t C, float* mean, float* var, int64_t threads) {
  moments(y, N, C, mean, var, threads);
}

void snn_affine(const float* y, const Norm* norm, int64_t N, int64_t C, float* out,
                int64_t threads) {
  affine(y, *norm, N, C, out, threads);
}

void snn_fire(const float* y, const float* rest, const float* a, const float* b, const float* ra,
              const float* rb, int64_t stride_y, const Neuron* n, int64_t T, int64_t M, int64_t C,
              float* s, int64_t threads) {
  const Input in{y, rest, a, b, ra, rb, stride_y, M * C};
  fire(in, *n, T, M, C, nullptr, nullptr, {s, nullptr, nullptr, nullptr}, threads);
}

void snn_backward(const float* g, const float* g2, const float* y, const float* rest,
                  const float* a, const float* b, const float* mean, const float* rstd,
                  const float* ra, const float* rb, const float* rmean, const float* rrstd,
                  int64_t stride_y, const Neuron* n, int64_t T, int64_t M, int64_t C, float* gy,
                  float* grest, float* dweight, float* dbias, float* drweight, float* ddecay,
                  int64_t batch_stats, int64_t threads) {
  const Input in{y, rest, a, b, ra, rb, stride_y, M * C};
  const Grads out{g, g2, mean, rstd, rmean, rrstd, gy, grest, dweight, dbias, drweight, ddecay};
  backward(in, *n, T, M, C, out, batch_stats != 0, threads);
}

void snn_rate_fire(const float* y, const float* rest, const float* a, const float* b,
                   const float* mean, const float* rstd, int64_t stride_y, const Neuron* n,
                   int64_t T, int64_t M, int64_t C, float* s, float* rate, float* elig, float* xhat,
                   int64_t threads) {
  const Input in{y, rest, a, b, nullptr, nullptr, stride_y, M * C};
  fire(in, *n, T, M, C, mean, rstd, {s, rate, elig, xhat}, threads);
}

void snn_rate_backward(const float* g, const float* elig, const float* xhat, const float* a,
                       int64_t M, int64_t C, float* gc, float* gz, float* dweight, float* dbias,
                       int64_t batch_stats, int64_t threads) {
  const MeanGrads out{gc, gz, dweight, dbias};
  rate_backward(g, elig, xhat, a, M, C, out, batch_stats != 0, threads);
}

void snn_average(const float* x, int64_t rows, int64_t w, int64_t C, int64_t k, float* out,
                 int64_t threads) {
  average(x, rows, w, C, k, out, threads);
}

void snn_average_backward(const float* g, int64_t rows, int64_t w, int64_t C, int64_t k, float* out,
                          int64_t threads) {
  average_backward(g, rows, w, C, k, out, threads);
}

}  // extern "C"
