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

// Surrogate derivative d of `length` membranes before reset; the kinds stand in neurons.py.
void slopes(const Neuron& n, const float* h, int64_t length, float* d) {
  const float th = n.v_th, p = n.shape;
  switch (n.surrogate) {
    case 0: {  // triangle
      const float area = p * p;
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        const float left = p - std::fabs(h[i] - th);
        d[i] = (left < 0.f ? 0.f : left) / area;
      }
      break;
    }
    case 1:  // rectangle
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) d[i] = (std::fabs(h[i] - th) < p / 2 ? 1.f : 0.f) / p;
      break;
    case 2:  // sigmoid
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        const float q = 1.f / (1.f + exp_(-p * (h[i] - th)));
        d[i] = p * q * (1.f - q);
      }
      break;
    case 3:  // atan
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        const float z = 1.57079632679f * p * (h[i] - th);
        d[i] = p / 2 / (1.f + z * z);
      }
      break;
    default:  // tanh: 1 - tanh(u)^2 = 4 e / (1 + e)^2 with e = exp(-2 |u|)
#pragma omp simd
      for (int64_t i = 0; i < length; ++i) {
        const float e = exp_(-2.f * std::fabs(h[i] - th));
        d[i] = p * 4.f * e / ((1.f + e) * (1.f + e));
      }
  }
}

inline float spike(float u, bool strict) {
  const bool fired = strict ? u > 0.f : u >= 0.f;
  return (fired ? 1.f : 0.f) + 0.f * u;  // a membrane that is not finite never passes as silent
}

struct Input {
  const float *y, *rest, *a, *b;
  int64_t stride_y, stride;
};

// v_pre of one segment at one timestep, into `h`; `v` is the membrane after the last reset.
void charge(const Input& in, const Neuron& n, int64_t t, int64_t offset, int64_t length,
            const float* a, const float* b, const float* v, float* h) {
  const float* y = in.y + t * in.stride_y + offset;
  const float decay = n.decay, gain = n.gain;
  if (in.rest) {
    const float* r = in.rest + t * in.stride + offset;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) h[i] = decay * v[i] + gain * (y[i] * a[i] + b[i] + r[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) h[i] = decay * v[i] + gain * (y[i] * a[i] + b[i]);
  }
}

// Spikes s of v_pre `h`, and the membrane v after the reset.
void reset(const Neuron& n, const float* h, int64_t length, float* s, float* v) {
  const float th = n.v_th, drop = n.drop;
  const bool strict = n.strict;
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) s[i] = spike(h[i] - th, strict);
  if (n.hard) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) v[i] = h[i] * (1.f - s[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) v[i] = h[i] - drop * s[i];
  }
}

// dv / dv_pre of the reset, given spikes s and slopes d.
void keeps(const Neuron& n, const float* h, const float* s, const float* d, int64_t length,
           float* keep) {
  const float drop = n.drop;
  if (n.hard && n.detach) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) keep[i] = 1.f - s[i];
  } else if (n.hard) {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) keep[i] = 1.f - s[i] - h[i] * d[i];
  } else if (n.detach) {
    std::fill(keep, keep + length, 1.f);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) keep[i] = 1.f - drop * d[i];
  }
}

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
        charge(in, n, t, offset, length, &A[channel], &B[channel], v, h);
        reset(n, h, length, s + t * in.stride + offset, v);
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
  const auto mean = tiled(out.mean, w, 0.f), rstd = tiled(out.rstd, w, 1.f);
  Sums sum_g(threads, w), sum_gx(threads, w), sum_d(threads, w);
  // With a residual the input's gradient has a place of its own; else it waits where gy will stand.
  float* place = in.rest ? out.grest : once ? nullptr : out.gy;
  parallel(threads, w.count, [&](int64_t id, int64_t begin, int64_t end) {
    std::vector<float> membranes(T * WIDTH), spikes(T * WIDTH), afters(learn ? T * WIDTH : 0);
    float v[WIDTH], gv[WIDTH], total[WIDTH], d[WIDTH], keep[WIDTH], gx[WIDTH];
    float acc_g[WIDTH], acc_gx[WIDTH], acc_d[WIDTH];
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      const float *a = &A[channel], *b = &B[channel], *mu = &mean[channel], *rs = &rstd[channel];
      std::fill(v, v + length, 0.f);
      for (int64_t t = 0; t < T; ++t) {
        charge(in, n, t, offset, length, a, b, v, &membranes[t * WIDTH]);
        reset(n, &membranes[t * WIDTH], length, &spikes[t * WIDTH], v);
        if (learn) std::copy(v, v + length, &afters[t * WIDTH]);
      }
      for (float* zero : {gv, total, acc_g, acc_gx, acc_d}) std::fill(zero, zero + length, 0.f);
      for (int64_t t = T - 1; t >= 0; --t) {
        const float *h = &membranes[t * WIDTH], *g = out.g + t * in.stride + offset;
        const float* y = in.y + t * in.stride_y + offset;
        slopes(n, h, length, d);
        keeps(n, h, &spikes[t * WIDTH], d, length, keep);
        if (learn) {
          const float* r = in.rest ? in.rest + t * in.stride + offset : nullptr;
          for (int64_t i = 0; i < length; ++i) {
            const float held = t > 0 ? afters[(t - 1) * WIDTH + i] : 0.f;
            const float x = n.decay_input ? y[i] * a[i] + b[i] + (r ? r[i] : 0.f) : 0.f;
            acc_d[i] += (g[i] * d[i] + gv[i] * keep[i]) * (held + x);
          }
        }
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) {
          const float now = g[i] * d[i] + gv[i] * keep[i];
          gv[i] = n.decay * now;
          gx[i] = n.gain * now;
        }
        if (place) std::copy(gx, gx + length, place + t * in.stride + offset);
        if (once) {
#pragma omp simd
          for (int64_t i = 0; i < length; ++i) total[i] += gx[i];
        } else {
#pragma omp simd
          for (int64_t i = 0; i < length; ++i) {
            acc_g[i] += gx[i];
            acc_gx[i] += gx[i] * ((y[i] - mu[i]) * rs[i]);
          }
        }
      }
      if (once) {
        const float* y = in.y + offset;
        std::copy(total, total + length, out.gy + offset);
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) {
          acc_g[i] = total[i];
          acc_gx[i] = total[i] * ((y[i] - mu[i]) * rs[i]);
        }
      }
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
  std::vector<float> k0(C), k1(C);
  for (int64_t c = 0; c < C; ++c) {
    out.dbias[c] = static_cast<float>(g[c]);
    out.dweight[c] = static_cast<float>(gx[c]);
    k0[c] = batch_stats ? static_cast<float>(g[c] / (Ty * M)) : 0.f;
    k1[c] = batch_stats ? static_cast<float>(gx[c] / (Ty * M)) : 0.f;
  }
  const auto K0 = tiled(k0.data(), w, 0.f), K1 = tiled(k1.data(), w, 0.f);
  const float* from = in.rest && !once ? out.grest : out.gy;
  parallel(threads, w.count, [&](int64_t, int64_t begin, int64_t end) {
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      const float *a = &A[channel], *mu = &mean[channel], *rs = &rstd[channel];
      const float *p0 = &K0[channel], *p1 = &K1[channel];
      for (int64_t t = 0; t < Ty; ++t) {
        const float *y = in.y + t * in.stride_y + offset, *G = from + t * in.stride + offset;
        float* gy = out.gy + t * in.stride + offset;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i)
          gy[i] = a[i] * (G[i] - p0[i] - (y[i] - mu[i]) * rs[i] * p1[i]);
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
  parallel(threads, w.count, [&](int64_t, int64_t begin, int64_t end) {
    float v[WIDTH], h[WIDTH], d[WIDTH], keep[WIDTH];
    float rho[WIDTH], elig[WIDTH], rate[WIDTH], drive[WIDTH];
    int64_t offset, channel, length;
    for (int64_t seg = begin; seg < end; ++seg) {
      w.at(seg, offset, channel, length);
      for (float* zero : {v, elig, rate, drive}) std::fill(zero, zero + length, 0.f);
      std::fill(rho, rho + length, n.gain);
      for (int64_t t = 0; t < T; ++t) {
        const float* y = in.y + t * in.stride_y + offset;
        float* s = out.s + t * in.stride + offset;
        charge(in, n, t, offset, length, &A[channel], &B[channel], v, h);
        reset(n, h, length, s, v);
        slopes(n, h, length, d);
        keeps(n, h, s, d, length, keep);
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) {
          rate[i] += s[i];
          drive[i] += y[i];
          elig[i] += d[i] * rho[i];
          rho[i] = n.gain + n.decay * keep[i] * rho[i];
        }
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

// Spikes as bits, eight to a byte, lowest first; the last byte is filled up with zeros.
void snn_pack(const float* s, int64_t n, uint8_t* bits) {
  for (int64_t i = 0; i < n / 8; ++i) {
    uint8_t byte = 0;
    for (int k = 0; k < 8; ++k) byte |= static_cast<uint8_t>(s[8 * i + k] != 0.f) << k;
    bits[i] = byte;
  }
  if (n % 8) {
    uint8_t byte = 0;
    for (int64_t k = n / 8 * 8; k < n; ++k) byte |= static_cast<uint8_t>(s[k] != 0.f) << (k % 8);
    bits[n / 8] = byte;
  }
}

void snn_unpack(const uint8_t* bits, int64_t n, float* s) {
  for (int64_t i = 0; i < n; ++i) s[i] = static_cast<float>(bits[i / 8] >> (i % 8) & 1);
}

}  // extern "C"
