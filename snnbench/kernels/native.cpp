// Fused normalisation + residual + LIF over all timesteps, for CPUs: plain C++ without torch.
//
// Arrays are contiguous [T, M, C]: M batch x pixels, C channels (the channels-last layout).  `y` has
// a time stride of 0 where the input is the same at every timestep.  With the membrane v, from 0:
//
//     x     = a * y + b + rest                 a, b per channel; 1 and 0 without normalisation
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
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t WIDTH = 256;  // elements of a segment, at most

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
  if (values)
    for (int64_t i = 0; i < w.tile; ++i) out[i] = values[i % w.C];
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
    for (int64_t i = 0; i < threads * tile; ++i) out[i % tile % C] += data[i];
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
    return (left < 0.f ? 0.f : left) / (p * p);
  }
  if (KIND == 1) return (std::fabs(u) < p / 2 ? 1.f : 0.f) / p;  // rectangle
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

inline float spike(float u, bool strict) {
  const bool fired = strict ? u > 0.f : u >= 0.f;
  return (fired ? 1.f : 0.f) + 0.f * u;  // a membrane that is not finite never passes as silent
}

struct Input {
  const float *y, *rest, *a, *b;
  int64_t stride_y, stride;
};

// One timestep of a segment: v_pre into `h`, spikes into `s`, the membrane `v` moves on.
template <bool HARD, bool REST>
void step_(const Neuron& n, const float* __restrict y, const float* __restrict r,
           const float* __restrict a, const float* __restrict b, int64_t length,
           float* __restrict v, float* __restrict h, float* __restrict s) {
  const float decay = n.decay, gain = n.gain, th = n.v_th, drop = n.drop;
  const bool strict = n.strict;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    float x = y[i] * a[i] + b[i];
    if (REST) x = x + r[i];
    const float v_pre = decay * v[i] + gain * x, f = spike(v_pre - th, strict);
    h[i] = v_pre;
    s[i] = f;
    v[i] = HARD ? v_pre * (1.f - f) : v_pre - drop * f;
  }
}

void step(const Input& in, const Neuron& n, int64_t t, int64_t offset, int64_t length,
          const float* a, const float* b, float* v, float* h, float* s) {
  const float* y = in.y + t * in.stride_y + offset;
  const float* r = in.rest ? in.rest + t * in.stride + offset : nullptr;
  if (n.hard) r ? step_<true, true>(n, y, r, a, b, length, v, h, s)
                : step_<true, false>(n, y, r, a, b, length, v, h, s);
  else r ? step_<false, true>(n, y, r, a, b, length, v, h, s)
         : step_<false, false>(n, y, r, a, b, length, v, h, s);
}

// dv / dv_pre of the reset, given a spike f and a slope d.
template <bool HARD, bool DETACH>
inline float kept(float v_pre, float f, float d, float drop) {
  float keep = HARD ? 1.f - f : 1.f;
  if (!DETACH) keep = keep - (HARD ? v_pre : drop) * d;
  return keep;
}

// One timestep back: the gradient gx of the input current, and sums of it and of gx (y - mean).
template <int KIND, bool HARD, bool DETACH>
void back_(const Neuron& n, const float* __restrict h, const float* __restrict s,
           const float* __restrict g, const float* __restrict y, const float* __restrict mu,
           int64_t length, float* __restrict gv, float* __restrict gx, float* __restrict sum_g,
           float* __restrict sum_gx) {
  const float decay = n.decay, gain = n.gain, th = n.v_th, drop = n.drop, p = n.shape;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    const float d = slope<KIND>(h[i] - th, p);
    const float now = g[i] * d + gv[i] * kept<HARD, DETACH>(h[i], s[i], d, drop);
    const float x = gain * now;
    gv[i] = decay * now;
    gx[i] = x;
    sum_g[i] += x;
    sum_gx[i] += x * (y[i] - mu[i]);
  }
}

// One timestep of the time-means: rate, eligibility and drive; rho is the sensitivity of v_pre.
template <int KIND, bool HARD, bool DETACH>
void means_(const Neuron& n, const float* __restrict h, const float* __restrict s,
            const float* __restrict y, int64_t length, float* __restrict rho,
            float* __restrict elig, float* __restrict rate, float* __restrict drive) {
  const float decay = n.decay, gain = n.gain, th = n.v_th, drop = n.drop, p = n.shape;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    const float d = slope<KIND>(h[i] - th, p);
    rate[i] += s[i];
    drive[i] += y[i];
    elig[i] += d * rho[i];
    rho[i] = gain + decay * kept<HARD, DETACH>(h[i], s[i], d, drop) * rho[i];
  }
}

// The instance for a neuron: loops know the surrogate and the reset when they are compiled.
#define PICK(F, n) \
  ((n).surrogate == 0 ? PICK_RESET(F, 0, n) : (n).surrogate == 1 ? PICK_RESET(F, 1, n) \
   : (n).surrogate == 2 ? PICK_RESET(F, 2, n) : (n).surrogate == 3 ? PICK_RESET(F, 3, n) \
                                              : PICK_RESET(F, 4, n))
#define PICK_RESET(F, KIND, n) \
  ((n).hard ? ((n).detach ? F<KIND, true, true> : F<KIND, true, false>) \
            : ((n).detach ? F<KIND, false, true> : F<KIND, false, false>))

void fire(const Input& in, const Neuron& n, int64_t T, int64_t M, int64_t C, float* s,
          int64_t threads) {
  const Walk w(M, C);
  const auto A = tiled(in.a, w, 1.f), B = tiled(in.b, w, 0.f);
  parallel(threads, w.count, [&](int64_t, int64_t begin, int64_t end) {
    float v[WIDTH], h[WIDTH];
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      std::fill(v, v + length, 0.f);
      for (int64_t t = 0; t < T; ++t) {
        step(in, n, t, offset, length, &A[channel], &B[channel], v, h,
             s + t * in.stride + offset);
      }
    }
  });
}

struct Grads {
  const float *g, *mean, *rstd;
  float *gy, *grest, *dweight, *dbias, *ddecay;
};

void backward(const Input& in, const Neuron& n, int64_t T, int64_t M, int64_t C, const Grads& out,
              bool batch_stats, int64_t threads) {
  const Walk w(M, C);
  const bool once = in.stride_y == 0 && T > 1, learn = n.learn_decay;
  const auto A = tiled(in.a, w, 1.f), B = tiled(in.b, w, 0.f);
  const auto mean = tiled(out.mean, w, 0.f);
  Sums sum_g(threads, w), sum_gx(threads, w), sum_d(threads, w);
  // With a residual the input's gradient has a place of its own; else it waits where gy will stand.
  float* place = in.rest ? out.grest : once ? nullptr : out.gy;
  const auto back = PICK(back_, n);
  parallel(threads, w.count, [&](int64_t id, int64_t begin, int64_t end) {
    std::vector<float> membranes(T * WIDTH), spikes(T * WIDTH), afters(learn ? T * WIDTH : 0);
    float v[WIDTH], gv[WIDTH], total[WIDTH], gx[WIDTH], acc_g[WIDTH], acc_gx[WIDTH], acc_d[WIDTH];
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      const float *a = &A[channel], *b = &B[channel], *mu = &mean[channel];
      std::fill(v, v + length, 0.f);
      for (int64_t t = 0; t < T; ++t) {
        step(in, n, t, offset, length, a, b, v, &membranes[t * WIDTH], &spikes[t * WIDTH]);
        if (learn) std::copy(v, v + length, &afters[t * WIDTH]);
      }
      for (float* zero : {gv, total, acc_g, acc_gx, acc_d}) std::fill(zero, zero + length, 0.f);
      for (int64_t t = T - 1; t >= 0; --t) {
        const float* y = in.y + t * in.stride_y + offset;
        float* to = place ? place + t * in.stride + offset : gx;
        back(n, &membranes[t * WIDTH], &spikes[t * WIDTH], out.g + t * in.stride + offset, y, mu,
             length, gv, to, acc_g, acc_gx);
        if (once)
          for (int64_t i = 0; i < length; ++i) total[i] += to[i];
        if (learn) {
          const float* r = in.rest ? in.rest + t * in.stride + offset : nullptr;
          for (int64_t i = 0; i < length; ++i) {
            const float held = t > 0 ? afters[(t - 1) * WIDTH + i] : 0.f;
            const float x = n.decay_input ? y[i] * a[i] + b[i] + (r ? r[i] : 0.f) : 0.f;
            acc_d[i] += to[i] / n.gain * (held + x);
          }
        }
      }
      if (once) std::copy(total, total + length, out.gy + offset);
      double *dg = sum_g.of(id) + channel, *dx = sum_gx.of(id) + channel;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        dg[i] += acc_g[i];
        dx[i] += acc_gx[i];
      }
      double* dd = sum_d.of(id) + channel;
      for (int64_t i = 0; learn && i < length; ++i) dd[i] += acc_d[i];
    }
  });
  if (learn) {
    double total = 0;
    for (double part : sum_d.folded()) total += part;
    out.ddecay[0] = static_cast<float>(total);
  }
  if (!in.a) return;
  const auto g = sum_g.folded(), gx = sum_gx.folded();
  const int64_t Ty = once ? 1 : T;
  std::vector<float> k0(C), k1(C);  // gy = a (G - k0 - (y - mean) k1)
  for (int64_t c = 0; c < C; ++c) {
    const double scaled = gx[c] * out.rstd[c];  // the sum of gx xhat
    out.dbias[c] = static_cast<float>(g[c]);
    out.dweight[c] = static_cast<float>(scaled);
    k0[c] = batch_stats ? static_cast<float>(g[c] / (Ty * M)) : 0.f;
    k1[c] = batch_stats ? static_cast<float>(scaled * out.rstd[c] / (Ty * M)) : 0.f;
  }
  const auto K0 = tiled(k0.data(), w, 0.f), K1 = tiled(k1.data(), w, 0.f);
  const float* from = in.rest && !once ? out.grest : out.gy;
  parallel(threads, w.count, [&](int64_t, int64_t begin, int64_t end) {
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      const float *a = &A[channel], *mu = &mean[channel];
      const float *p0 = &K0[channel], *p1 = &K1[channel];
      for (int64_t t = 0; t < Ty; ++t) {
        const float *y = in.y + t * in.stride_y + offset, *G = from + t * in.stride + offset;
        float* gy = out.gy + t * in.stride + offset;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i)
          gy[i] = a[i] * (G[i] - p0[i] - (y[i] - mu[i]) * p1[i]);
      }
    }
  });
}

struct Rates {
  const float *mean, *rstd;
  float *s, *rate, *elig, *xhat;
};

void rate_fire(const Input& in, const Neuron& n, int64_t T, int64_t M, int64_t C, const Rates& out,
               int64_t threads) {
  const Walk w(M, C);
  const auto A = tiled(in.a, w, 1.f), B = tiled(in.b, w, 0.f);
  const auto mean = tiled(out.mean, w, 0.f), rstd = tiled(out.rstd, w, 1.f);
  const float share = 1.f / static_cast<float>(T);
  const auto means = PICK(means_, n);
  parallel(threads, w.count, [&](int64_t, int64_t begin, int64_t end) {
    float v[WIDTH], h[WIDTH], rho[WIDTH], elig[WIDTH], rate[WIDTH], drive[WIDTH];
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      for (float* zero : {v, elig, rate, drive}) std::fill(zero, zero + length, 0.f);
      std::fill(rho, rho + length, n.gain);
      for (int64_t t = 0; t < T; ++t) {
        float* s = out.s + t * in.stride + offset;
        step(in, n, t, offset, length, &A[channel], &B[channel], v, h, s);
        means(n, h, s, in.y + t * in.stride_y + offset, length, rho, elig, rate, drive);
      }
      const float *mu = &mean[channel], *rs = &rstd[channel];
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        out.rate[offset + i] = rate[i] * share;
        out.elig[offset + i] = elig[i] * share;
      }
      for (int64_t i = 0; out.xhat && i < length; ++i)
        out.xhat[offset + i] = (drive[i] * share - mu[i]) * rs[i];
    }
  });
}

}  // namespace

extern "C" {

// Biased variance and mean of every channel of y [N, C].
void snn_stats(const float* y, int64_t N, int64_t C, float* mean, float* var, int64_t threads) {
  const Walk w(N, C);
  const auto shift = tiled(y, w, 0.f);  // the first row: keeps the squares small
  Sums sum(threads, w), squares(threads, w);
  parallel(threads, w.count, [&](int64_t id, int64_t begin, int64_t end) {
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      double *s = sum.of(id) + channel, *q = squares.of(id) + channel;
      const float *x = y + offset, *m = &shift[channel];
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        const double d = x[i] - m[i];
        s[i] += d;
        q[i] += d * d;
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

void snn_fire(const float* y, const float* rest, const float* a, const float* b, int64_t stride_y,
              const Neuron* n, int64_t T, int64_t M, int64_t C, float* s, int64_t threads) {
  const Input in{y, rest, a, b, stride_y, M * C};
  fire(in, *n, T, M, C, s, threads);
}

void snn_backward(const float* g, const float* y, const float* rest, const float* a, const float* b,
                  const float* mean, const float* rstd, int64_t stride_y, const Neuron* n, int64_t T,
                  int64_t M, int64_t C, float* gy, float* grest, float* dweight, float* dbias,
                  float* ddecay, int64_t batch_stats, int64_t threads) {
  const Input in{y, rest, a, b, stride_y, M * C};
  const Grads out{g, mean, rstd, gy, grest, dweight, dbias, ddecay};
  backward(in, *n, T, M, C, out, batch_stats != 0, threads);
}

void snn_rate_fire(const float* y, const float* rest, const float* a, const float* b,
                   const float* mean, const float* rstd, int64_t stride_y, const Neuron* n,
                   int64_t T, int64_t M, int64_t C, float* s, float* rate, float* elig, float* xhat,
                   int64_t threads) {
  const Input in{y, rest, a, b, stride_y, M * C};
  const Rates out{mean, rstd, s, rate, elig, xhat};
  rate_fire(in, *n, T, M, C, out, threads);
}

}  // extern "C"
