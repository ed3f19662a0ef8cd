// Patch errors, patch log ratios and their gradient on CPUs. Free of torch: raw pointers and sizes, called through ctypes.
//
// A task is a block of whole rows of a few frames of one sample, with all channels. It keeps one accumulator per latent
// position, so the inner loop runs over whole contiguous rows however short and ragged the patches are, and the order of
// every sum is fixed by the shape alone: neither the vector width nor the number of threads can change a bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __x86_64__
#include <emmintrin.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#define HALO_EXPORT extern "C" __attribute__((visibility("default")))
#define HALO_INLINE inline __attribute__((always_inline))

namespace {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

enum Dtype { float64, float32, bfloat16, float16, dtypes };

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, double> ? float64
                           : std::is_same_v<T, float> ? float32
                           : std::is_same_v<T, bf16>  ? bfloat16
                                                      : float16;

// Sums are taken in double if any of the latents is double, else in float.
template <class... T>
using Accumulate = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;

HALO_INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

HALO_INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

HALO_INLINE double widen(double x) { return x; }
HALO_INLINE float widen(float x) { return x; }
HALO_INLINE float widen(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

HALO_INLINE float widen(fp16 x) {
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
    // Moves the exponent bias from 15 to 127; exact for subnormals too.
    const uint32_t finite = as_bits(as_float(magnitude) * as_float(0x77800000u));
    const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
    return as_float(value | (x.bits & 0x8000u) << 16);
}

HALO_INLINE void narrow(double x, double& to) { to = x; }
HALO_INLINE void narrow(double x, float& to) { to = static_cast<float>(x); }
HALO_INLINE void narrow(float x, float& to) { to = x; }

HALO_INLINE void narrow(float x, bf16& to) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

HALO_INLINE void narrow(float x, fp16& to) {
    const uint32_t bits = as_bits(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 the half is subnormal: adding 0.5 lets the float unit round to a multiple of 2^-24.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    to.bits = static_cast<uint16_t>((magnitude >= 0x477ff000u ? large : finite) | ((bits >> 16) & 0x8000u));
}

constexpr int64_t cache_line = 64;

// ---- rows: the only loops over latent elements

// Loops go by strips of four cache lines: a core asks for the lines of all its inputs well before it needs them, also across
// the borders of pages, where the hardware does not look ahead.

constexpr int64_t strip_bytes = 256, ahead_bytes = 3072;

template <int64_t count, class T>
HALO_INLINE void fetch(const T* data) {
    const char* at = reinterpret_cast<const char*>(data) + ahead_bytes;
    for (int64_t k = 0; k < count * static_cast<int64_t>(sizeof(T)); k += cache_line) __builtin_prefetch(at + k);
    asm volatile("");  // else GCC takes this function for one without effect and drops its calls
}

// Calls body(i) for first <= i < count, each strip after having fetched from every input. A strip is counted in elements of the
// first input.
template <class Body, class First, class... Inputs>
HALO_INLINE void by_strips(int64_t first, int64_t count, const Body& body, const First* input, const Inputs*... inputs) {
    constexpr int64_t strip = strip_bytes / static_cast<int64_t>(sizeof(First));
    int64_t i = first;
    for (; i + strip <= count; i += strip) {
        fetch<strip>(input + i);
        (fetch<strip>(inputs + i), ...);
        for (int64_t j = 0; j < strip; ++j) body(i + j);
    }
    for (; i < count; ++i) body(i);
}

// P is the type of the policy and of its reference, T that of the target: each is widened to the type of the sums as it is read.
template <class P, class T>
HALO_INLINE void add_log_ratio(Accumulate<P, T>* __restrict sum, const P* __restrict policy, const P* __restrict reference,
                               const T* __restrict target, int64_t count) {
    using A = Accumulate<P, T>;
    const auto body = [&](int64_t i) {
        const A o = widen(policy[i]), o_ref = widen(reference[i]), tau = widen(target[i]);
        sum[i] += (o_ref - o) * ((o - tau) + (o_ref - tau));
    };
    by_strips(0, count, body, policy, reference, target);
}

template <class P, class T>
HALO_INLINE void add_error(Accumulate<P, T>* __restrict sum, const P* __restrict prediction, const T* __restrict target,
                           int64_t count) {
    using A = Accumulate<P, T>;
    const auto body = [&](int64_t i) {
        const A residual = static_cast<A>(widen(prediction[i])) - static_cast<A>(widen(target[i]));
        sum[i] += residual * residual;
    };
    by_strips(0, count, body, prediction, target);
}

// Past the caches: an ordinary store first reads the line that it overwrites. Both pointers are multiples of 16 bytes.
HALO_INLINE void stream(void* to, const void* from, int64_t bytes) {
#ifdef __x86_64__
    for (int64_t k = 0; k < bytes; k += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<char*>(to) + k),
                         _mm_load_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + k)));
#else
    std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

template <class P, class T>
HALO_INLINE void write_gradient(P* __restrict gradient, const P* __restrict prediction, const T* __restrict target,
                                const Accumulate<P, T>* __restrict scale, int64_t count, bool past_caches) {
    using A = Accumulate<P, T>;
    constexpr int64_t strip = strip_bytes / static_cast<int64_t>(sizeof(P));
    const auto write = [&](int64_t i, P& to) {
        narrow((static_cast<A>(widen(prediction[i])) - static_cast<A>(widen(target[i]))) * scale[i], to);
    };
    // Stores that cross a cache line are dear, so the first few elements are taken apart.
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(gradient) % cache_line);
    const int64_t head = std::min(count, (cache_line - past) % cache_line / static_cast<int64_t>(sizeof(P)));
    for (int64_t i = 0; i < head; ++i) write(i, gradient[i]);
    int64_t i = head;
    for (; past_caches && i + strip <= count; i += strip) {
        alignas(cache_line) P room[strip];
        fetch<strip>(prediction + i);
        fetch<strip>(target + i);
        for (int64_t j = 0; j < strip; ++j) write(i + j, room[j]);
        stream(gradient + i, room, strip_bytes);
    }
    by_strips(i, count, [&](int64_t j) { write(j, gradient[j]); }, prediction, target);
}

template <class P, class T>
struct Rows {
    using A = Accumulate<P, T>;
    void (*log_ratio)(A*, const P*, const P*, const T*, int64_t);
    void (*error)(A*, const P*, const T*, int64_t);
    void (*gradient)(P*, const P*, const T*, const A*, int64_t, bool);
};

#define HALO_ROWS(NAME, TARGET)                                                                                                  \
    template <class P, class T>                                                                                                  \
    struct NAME {                                                                                                                \
        using A = Accumulate<P, T>;                                                                                              \
        TARGET static void log_ratio(A* sum, const P* o, const P* o_ref, const T* tau, int64_t count) {                          \
            add_log_ratio(sum, o, o_ref, tau, count);                                                                            \
        }                                                                                                                        \
        TARGET static void error(A* sum, const P* o, const T* tau, int64_t count) { add_error(sum, o, tau, count); }             \
        TARGET static void gradient(P* out, const P* o, const T* tau, const A* scale, int64_t count, bool past_caches) {         \
            write_gradient(out, o, tau, scale, count, past_caches);                                                              \
        }                                                                                                                        \
        static constexpr Rows<P, T> rows{log_ratio, error, gradient};                                                            \
    };

HALO_ROWS(Portable, )
#ifdef __x86_64__
HALO_ROWS(Avx2, __attribute__((target("avx2"))))
HALO_ROWS(Avx512, __attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

enum Level { portable = 0, avx2 = 1, avx512 = 2 };

Level best_level() {
#ifdef __x86_64__
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return avx512;
    if (__builtin_cpu_supports("avx2")) return avx2;
#endif
    return portable;
}

const Level supported = best_level();
Level level = supported;

template <class P, class T>
const Rows<P, T>& rows_in_use() {
#ifdef __x86_64__
    if (level == avx512) return Avx512<P, T>::rows;
    if (level == avx2) return Avx2<P, T>::rows;
#endif
    return Portable<P, T>::rows;
}

// ---- geometry

template <class Data>
struct View {  // [N, C, F, H, W], strides in elements
    Data* data;  // of the dtype's elements
    const int64_t* stride;
    int dtype;

    int64_t at(int64_t n, int64_t c, int64_t f, int64_t h) const {
        return n * stride[0] + c * stride[1] + f * stride[2] + h * stride[3];
    }
};

struct Span {
    int64_t begin, end, patch;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
    int64_t N, C, F, H, W, f, h, w;
    int64_t rows_per_task;
    std::vector<Span> frames;   // pieces of the patches' frames; one task never crosses a patch in time
    std::vector<int64_t> edge;  // borders of the patches along a row
    int64_t row_blocks;

    Geometry(const int64_t* shape, const int64_t* grid)
        : N(shape[0]), C(shape[1]), F(shape[2]), H(shape[3]), W(shape[4]), f(grid[0]), h(grid[1]), w(grid[2]) {
        constexpr int64_t accumulators = 8192;  // 32 KiB of floats stay in the first-level cache
        constexpr int64_t elements_per_task = 1 << 19;
        row_blocks = ceil_div(H, std::max<int64_t>(1, accumulators / std::max<int64_t>(1, W)));
        rows_per_task = ceil_div(H, row_blocks);
        row_blocks = ceil_div(H, rows_per_task);
        const int64_t depth = std::max<int64_t>(1, elements_per_task / std::max<int64_t>(1, C * rows_per_task * W));
        for (int64_t k = 0; k < f; ++k) {
            const int64_t begin = k * F / f, length = (k + 1) * F / f - begin, cuts = ceil_div(length, depth);
            for (int64_t i = 0; i < cuts; ++i) frames.push_back({begin + i * length / cuts, begin + (i + 1) * length / cuts, k});
        }
        for (int64_t k = 0; k <= w; ++k) edge.push_back(k * W / w);
    }

    int64_t tasks() const { return N * pieces() * row_blocks; }
    int64_t pieces() const { return static_cast<int64_t>(frames.size()); }
    int64_t patch_of_row(int64_t row) const { return ((row + 1) * h - 1) / H; }
    int64_t first_row(int64_t patch) const { return patch * H / h; }
    double elements(int64_t kf, int64_t kh, int64_t kw) const {
        return static_cast<double>(C) * static_cast<double>((kf + 1) * F / f - kf * F / f) *
               static_cast<double>(first_row(kh + 1) - first_row(kh)) * static_cast<double>(edge[kw + 1] - edge[kw]);
    }
};

struct Task {
    int64_t n, piece, first, last;  // rows first .. last - 1

    Task(const Geometry& g, int64_t index)
        : n(index / (g.pieces() * g.row_blocks)),
          piece(index / g.row_blocks % g.pieces()),
          first(index % g.row_blocks * g.rows_per_task),
          last(std::min(first + g.rows_per_task, g.H)) {}
};

int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Calls run(x) with x of the dtype's C++ type.
template <class Run>
void by_dtype(int dtype, const Run& run) {
    switch (dtype) {
        case float64: return run(double{});
        case float32: return run(float{});
        case bfloat16: return run(bf16{});
        default: return run(fp16{});
    }
}

// A row in the type of the loops, T. One with gaps, or of another dtype, is packed first; all others are read in place.
template <class T>
const T* packed_row(const View<const void>& view, int64_t offset, int64_t count, T* buffer) {
    if (view.dtype == dtype_of<T> && view.stride[4] == 1) return static_cast<const T*>(view.data) + offset;
    by_dtype(view.dtype, [&](auto element) {
        using From = decltype(element);
        const From* from = static_cast<const From*>(view.data) + offset;
        for (int64_t i = 0; i < count; ++i) {
            if constexpr (std::is_same_v<From, T>)
                buffer[i] = from[i * view.stride[4]];
            else if constexpr (std::is_floating_point_v<T>)
                buffer[i] = static_cast<T>(widen(from[i * view.stride[4]]));
        }
    });
    return buffer;
}

// The other way: a row that was computed in T.
template <class T>
void unpack_row(const View<void>& view, int64_t offset, int64_t count, const T* buffer) {
    by_dtype(view.dtype, [&](auto element) {
        using To = decltype(element);
        To* to = static_cast<To*>(view.data) + offset;
        for (int64_t i = 0; i < count; ++i) {
            if constexpr (std::is_same_v<To, T>)
                to[i * view.stride[4]] = buffer[i];
            else if constexpr (std::is_floating_point_v<T>)
                narrow(static_cast<Accumulate<To, T>>(buffer[i]), to[i * view.stride[4]]);
        }
    });
}

// Whether all rows of a view can be read or written in place, and follow each other.
template <class T, class Data>
bool whole(int64_t W, const View<Data>& view) {
    return view.dtype == dtype_of<T> && view.stride[4] == 1 && view.stride[3] == W;
}

// ---- forward

// Adds the accumulators of a task patch by patch in double: first down the rows, then along the row.
template <class A>
void fold(const Geometry& g, const Task& task, const A* sum, double* column, double* partial) {
    for (int64_t row = task.first; row < task.last;) {
        const int64_t end = std::min(task.last, g.first_row(g.patch_of_row(row) + 1));
        double* to = partial + ((task.n * g.pieces() + task.piece) * g.H + row) * g.w;
        std::fill(column, column + g.W, 0.0);
        for (; row < end; ++row) {
            const A* from = sum + (row - task.first) * g.W;
            for (int64_t i = 0; i < g.W; ++i) column[i] += static_cast<double>(from[i]);
        }
        for (int64_t k = 0; k < g.w; ++k) {
            double total = 0.0;
            for (int64_t i = g.edge[k]; i < g.edge[k + 1]; ++i) total += column[i];
            to[k] = total;
        }
    }
}

template <class A>
void finish(const Geometry& g, const double* partial, A* out, int threads) {
    [[maybe_unused]] const int team = threads;
#pragma omp parallel for num_threads(team) schedule(static) if (g.N * g.f * g.h * g.w > 4096)
    for (int64_t box = 0; box < g.N * g.f * g.h; ++box) {
        const int64_t n = box / (g.f * g.h), kf = box / g.h % g.f, kh = box % g.h;
        for (int64_t kw = 0; kw < g.w; ++kw) {
            double total = 0.0;
            for (int64_t piece = 0; piece < g.pieces(); ++piece) {
                if (g.frames[piece].patch != kf) continue;
                for (int64_t row = g.first_row(kh); row < g.first_row(kh + 1); row += g.rows_per_task - row % g.rows_per_task)
                    total += partial[((n * g.pieces() + piece) * g.H + row) * g.w + kw];
            }
            out[box * g.w + kw] = static_cast<A>(total / g.elements(kf, kh, kw));
        }
    }
}

// One stretch of `size` elements for each thread, beginning on a cache line.
template <class A>
class PerThread {
   public:
    PerThread(int threads, int64_t size)
        : step_((size * static_cast<int64_t>(sizeof(A)) + cache_line - 1) / cache_line * cache_line), room_(threads * step_ + cache_line) {}

    A* mine() {
        const auto at = reinterpret_cast<uintptr_t>(room_.data()) + cache_line - 1;
        return reinterpret_cast<A*>(at / cache_line * cache_line + static_cast<uintptr_t>(thread_index() * step_));
    }

   private:
    int64_t step_;
    std::vector<char> room_;
};

template <class P, class T>
void forward(const Geometry& g, View<const void> policy, View<const void> reference, View<const void> target, void* out,
             int threads) {
    using A = Accumulate<P, T>;
    const Rows<P, T> rows = rows_in_use<P, T>();
    const int64_t block = g.rows_per_task * g.W;
    PerThread<A> sums(threads, block);
    PerThread<double> columns(threads, g.W);
    PerThread<P> packs(threads, 2 * g.W);
    PerThread<T> target_packs(threads, g.W);
    std::vector<double> partial(g.N * g.pieces() * g.H * g.w);
    const bool error_only = reference.data == nullptr;
    const bool in_place = whole<P>(g.W, policy) && whole<T>(g.W, target) && (error_only || whole<P>(g.W, reference));

#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t index = 0; index < g.tasks(); ++index) {
        const Task task(g, index);
        A* sum = sums.mine();
        P* pack = packs.mine();
        std::fill(sum, sum + block, A(0));
        const int64_t step = in_place ? task.last - task.first : 1;
        for (int64_t c = 0; c < g.C; ++c)
            for (int64_t f = g.frames[task.piece].begin; f < g.frames[task.piece].end; ++f)
                for (int64_t h = task.first; h < task.last; h += step) {
                    A* to = sum + (h - task.first) * g.W;
                    const P* o = packed_row(policy, policy.at(task.n, c, f, h), g.W, pack);
                    const T* tau = packed_row(target, target.at(task.n, c, f, h), g.W, target_packs.mine());
                    if (error_only)
                        rows.error(to, o, tau, step * g.W);
                    else
                        rows.log_ratio(to, o, packed_row(reference, reference.at(task.n, c, f, h), g.W, pack + g.W), tau,
                                       step * g.W);
                }
        fold(g, task, sum, columns.mine(), partial.data());
    }
    finish(g, partial.data(), static_cast<A*>(out), threads);
}

// ---- backward: 2 (o - tau) grad_p / Z_p

template <class A>
void spread(const Geometry& g, const Task& task, A factor, const A* grad, A* scale) {
    const int64_t kf = g.frames[task.piece].patch;
    for (int64_t row = task.first; row < task.last; ++row) {
        const int64_t kh = g.patch_of_row(row);
        A* to = scale + (row - task.first) * g.W;
        if (row > task.first && kh == g.patch_of_row(row - 1)) {
            std::copy(to - g.W, to, to);
            continue;
        }
        for (int64_t kw = 0; kw < g.w; ++kw) {
            const double value = static_cast<double>(factor * grad[((task.n * g.f + kf) * g.h + kh) * g.w + kw]);
            std::fill(to + g.edge[kw], to + g.edge[kw + 1], static_cast<A>(2.0 * value / g.elements(kf, kh, kw)));
        }
    }
}

constexpr int64_t large = 1 << 21;  // a second-level cache, and a large page

// A fresh tensor would be faulted in 4 KiB at a time as it is written, which takes longer than computing it. What was kept
// from before is left alone: to look at each of its pages takes time too.
void fault_in([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes, [[maybe_unused]] int threads) {
#ifdef __linux__
    constexpr int populate_write = 23;  // MADV_POPULATE_WRITE, since Linux 5.14; hints may be refused
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), at = reinterpret_cast<uintptr_t>(data);
    const uintptr_t begin = at / page * page, end = (at + static_cast<uintptr_t>(bytes) + page - 1) / page * page;
    unsigned char there = 0;
    if (mincore(reinterpret_cast<void*>((begin + end) / 2 / page * page), page, &there) == 0 && there & 1) return;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
    const auto last = static_cast<int64_t>((end - 1) / large);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (auto k = static_cast<int64_t>(begin / large); k <= last; ++k) {
        const uintptr_t first = std::max(begin, static_cast<uintptr_t>(k * large));
        const uintptr_t stop = std::min(end, static_cast<uintptr_t>((k + 1) * large));
        madvise(reinterpret_cast<void*>(first), stop - first, populate_write);
    }
#endif
}

template <class P, class T>
void backward(const Geometry& g, const void* factor, const void* grad, View<const void> prediction, View<const void> target,
              View<void> gradient, int threads) {
    using A = Accumulate<P, T>;
    const Rows<P, T> rows = rows_in_use<P, T>();
    const int64_t block = g.rows_per_task * g.W;
    PerThread<A> scales(threads, block);
    PerThread<P> packs(threads, 2 * g.W);
    PerThread<T> target_packs(threads, g.W);
    const bool in_place = whole<P>(g.W, prediction) && whole<T>(g.W, target) && whole<P>(g.W, gradient);
    const bool row_by_row = gradient.dtype != dtype_of<P> || gradient.stride[4] != 1;
    const int64_t bytes = g.N * g.C * g.F * g.H * g.W * static_cast<int64_t>(sizeof(P));
    const bool past_caches = in_place && bytes >= large;
    if (bytes >= large && gradient.dtype == dtype_of<P>) fault_in(gradient.data, bytes, threads);

#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t index = 0; index < g.tasks(); ++index) {
        const Task task(g, index);
        A* scale = scales.mine();
        P* pack = packs.mine();
        spread(g, task, factor ? *static_cast<const A*>(factor) : A(1), static_cast<const A*>(grad), scale);
        const int64_t step = in_place ? task.last - task.first : 1;
        for (int64_t c = 0; c < g.C; ++c)
            for (int64_t f = g.frames[task.piece].begin; f < g.frames[task.piece].end; ++f)
                for (int64_t h = task.first; h < task.last; h += step) {
                    const P* o = packed_row(prediction, prediction.at(task.n, c, f, h), g.W, pack);
                    const T* tau = packed_row(target, target.at(task.n, c, f, h), g.W, target_packs.mine());
                    const int64_t offset = gradient.at(task.n, c, f, h);
                    P* to = row_by_row ? pack + g.W : static_cast<P*>(gradient.data) + offset;
                    rows.gradient(to, o, tau, scale + (h - task.first) * g.W, step * g.W, past_caches);
                    if (row_by_row) unpack_row(gradient, offset, g.W, to);
                }
#ifdef __x86_64__
        _mm_sfence();  // streamed stores are not ordered by what ends the parallel region
#endif
    }
}

// ---- the H1 loss and its coefficients on the [2B, P] table

enum Link { sigmoid, conservative, robust, hinge, ipo, kto, poly, links };

struct TableNumbers {
    double link_parameter, video_weight, patch_weight, video_beta, patch_beta, video_gamma, video_delta, patch_gamma, patch_delta,
        sft_weight, patch_sft_weight, video_cap, patch_cap;
};

double sigma(double z) {
    const double e = std::exp(-std::abs(z));
    return (z >= 0 ? 1.0 : e) / (1.0 + e);
}

double softplus(double z) { return (z > 0 ? z : 0.0) + std::log1p(std::exp(-std::abs(z))); }

struct Value {
    double value, slope;
};

// phi(z) and its derivative; e is the label smoothing or, of poly, alpha.
Value apply_link(Link link, double e, double z) {
    switch (link) {
        case conservative:
            return {(1 - e) * softplus(-z) + e * softplus(z), -(1 - e) * sigma(-z) + e * sigma(z)};
        case robust:
            return {((1 - e) * softplus(-z) - e * softplus(z)) / (1 - 2 * e), (-(1 - e) * sigma(-z) - e * sigma(z)) / (1 - 2 * e)};
        case hinge:
            return {z >= 1 ? 0.0 : 1 - z, z < 1 ? -1.0 : 0.0};
        case ipo:
            return {(z - 0.5) * (z - 0.5), 2 * (z - 0.5)};
        case kto:
            return {sigma(-z), -sigma(z) * sigma(-z)};
        case poly:
            return {softplus(-z) + e * sigma(-z), -sigma(-z) - e * sigma(z) * sigma(-z)};
        case sigmoid:
            return {softplus(-z), -sigma(-z)};
        case links:
            break;
    }
    return {NAN, NAN};  // never: the caller's link was checked
}

// phi(min(z, cap)): beyond the cap there is no slope, at the cap itself there still is. A NaN is beyond no cap.
Value capped_link(Link link, double e, double z, double cap) {
    return z > cap ? Value{apply_link(link, e, cap).value, 0.0} : apply_link(link, e, z);
}

// s w of one group: a comparison with NaN is false, so an unlabelled entry is a tie.
template <class A>
double signed_weight(const A* rewards, int64_t a, int64_t b, double gamma, double delta) {
    if (rewards == nullptr) return 0.0;
    const double margin = static_cast<double>(rewards[a]) - static_cast<double>(rewards[b]);
    if (!(std::abs(margin) > delta)) return 0.0;
    const double size = gamma == 1.0 ? std::abs(margin) : gamma == 0.0 ? 1.0 : std::pow(std::abs(margin), gamma);
    return margin > 0 ? size : -size;
}

double sign(double x) { return x > 0 ? 1.0 : x < 0 ? -1.0 : 0.0; }

// Long tables are cut into blocks of this many patches, summed in order: bits do not depend on the number of threads.
constexpr int64_t table_block = 2048;

struct PairSums {
    double margin = 0, weight = 0, labelled = 0, loss = 0;
};

template <class A>
void table(const Geometry& g, const A* log_ratio, const A* patch_rewards, const A* video_rewards, const A* logit_scale,
           const A* pair_weight, const A* error, const A* loser_scale, Link link, const TableNumbers& to, A* loss, A* coefficients, A* video_logits, A* patch_logits,
           A* active, int threads) {
    const int64_t P = g.f * g.h * g.w, B = g.N / 2, blocks = ceil_div(P, table_block), work = B * blocks;
    [[maybe_unused]] const int team = P * B > table_block ? threads : 1;
    const double latent = static_cast<double>(g.C) * static_cast<double>(g.F) * static_cast<double>(g.H) * static_cast<double>(g.W);
    const auto volume = [&](int64_t p) { return g.elements(p / (g.h * g.w), p / g.w % g.h, p % g.w) / latent; };
    std::vector<PairSums> parts(work), pairs(B);
    std::vector<double> weights(B * P), video(B), share(B);

#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t index = 0; index < work; ++index) {
        const int64_t i = index / blocks, first = index % blocks * table_block;
        PairSums sum;
        for (int64_t p = first; p < std::min(first + table_block, P); ++p) {
            const int64_t a = i * P + p, b = (B + i) * P + p;
            const double weight = signed_weight(patch_rewards, a, b, to.patch_gamma, to.patch_delta);
            weights[a] = weight;
            sum.margin += volume(p) * (static_cast<double>(log_ratio[a]) - static_cast<double>(log_ratio[b]));
            sum.weight += std::abs(weight);
            sum.labelled += weight != 0;
        }
        parts[index] = sum;
    }

    double count = 0;
    for (int64_t i = 0; i < B; ++i) {
        for (int64_t k = 0; k < blocks; ++k) {
            pairs[i].margin += parts[i * blocks + k].margin;
            pairs[i].weight += parts[i * blocks + k].weight;
            pairs[i].labelled += parts[i * blocks + k].labelled;
        }
        video[i] = signed_weight(video_rewards, i, B + i, to.video_gamma, to.video_delta);
        const bool by_video = video[i] != 0 && (to.video_weight != 0 || to.sft_weight != 0);
        const bool by_patch = pairs[i].labelled > 0 && (to.patch_weight != 0 || to.patch_sft_weight != 0);
        share[i] = by_video || by_patch;
        active[i] = static_cast<A>(share[i]);
        count += share[i];
    }
    for (double& one : share) one /= std::max(count, 1.0);

#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (int64_t index = 0; index < work; ++index) {
        const int64_t i = index / blocks, first = index % blocks * table_block;
        const double video_scale = 0.5 * to.video_beta * (logit_scale ? static_cast<double>(logit_scale[i]) : 1.0);
        const double patch_scale = 0.5 * to.patch_beta * (logit_scale ? static_cast<double>(logit_scale[B + i]) : 1.0);
        const double video_logit = video_scale * sign(video[i]) * pairs[i].margin;
        const Value video_link = capped_link(link, to.link_parameter, video_logit, to.video_cap);
        const double omega = pair_weight ? static_cast<double>(pair_weight[i]) : 1.0;
        const double video_share = omega * to.video_weight;
        const double patch_share = omega * (to.patch_weight / (pairs[i].weight > 0 ? pairs[i].weight : 1.0));
        const double patch_rho = to.patch_sft_weight / std::max(pairs[i].labelled, 1.0);
        double sum = first == 0 ? video_share * std::abs(video[i]) * video_link.value : 0.0;
        for (int64_t p = first; p < std::min(first + table_block, P); ++p) {
            const int64_t a = i * P + p, b = (B + i) * P + p;
            const double margin = static_cast<double>(log_ratio[a]) - static_cast<double>(log_ratio[b]), weight = weights[a];
            const double logit = patch_scale * sign(weight) * margin;
            const Value patch_link = capped_link(link, to.link_parameter, logit, to.patch_cap);
            patch_logits[a] = static_cast<A>(logit);
            sum += patch_share * std::abs(weight) * patch_link.value;
            const double slope = -video_share * video[i] * video_link.slope * video_scale * volume(p) -
                                 patch_share * patch_scale * weight * patch_link.slope;
            double c_a = slope, c_b = -slope;
            if (loser_scale != nullptr && c_a < 0) c_a *= static_cast<double>(loser_scale[a]);
            if (loser_scale != nullptr && c_b < 0) c_b *= static_cast<double>(loser_scale[b]);
            if (error != nullptr) {
                const double rho = to.sft_weight * volume(p);
                const double rho_a = (weight > 0 ? patch_rho : 0.0) + (video[i] > 0 ? rho : 0.0);
                const double rho_b = (weight < 0 ? patch_rho : 0.0) + (video[i] < 0 ? rho : 0.0);
                sum += rho_a * static_cast<double>(error[a]) + rho_b * static_cast<double>(error[b]);
                c_a += rho_a;
                c_b += rho_b;
            }
            coefficients[a] = static_cast<A>(c_a * share[i]);
            coefficients[b] = static_cast<A>(c_b * share[i]);
        }
        parts[index].loss = sum;
        if (first == 0) video_logits[i] = static_cast<A>(video_logit);
    }

    double total = 0;
    for (int64_t i = 0; i < B; ++i) {
        double pair = 0;
        for (int64_t k = 0; k < blocks; ++k) pair += parts[i * blocks + k].loss;
        total += pair * share[i];
    }
    *loss = static_cast<A>(total);
}

enum Status { ok = 0, out_of_memory = 1, unknown_dtype = 2, unknown_link = 3 };

template <class Run>
int guarded(const Run& run) {
    try {
        return run();
    } catch (const std::bad_alloc&) {
        return out_of_memory;
    }
}

bool known(int dtype) { return 0 <= dtype && dtype < dtypes; }

// Calls run(p, t) with p and t of the types in which the loops read the policy and the target. Loops exist for every pair of
// the dtypes below double; what else there is, is widened row by row.
template <class Run>
int by_loops(int policy, int reference, int target, const Run& run) {
    if (!known(policy) || !known(reference) || !known(target)) return unknown_dtype;
    return guarded([&] {
        if (policy == float64 || reference == float64 || target == float64)
            run(double{}, double{});
        else if (policy != reference)
            run(float{}, float{});
        else
            by_dtype(policy, [&](auto p) {
                by_dtype(target, [&](auto t) {
                    if constexpr (!std::is_same_v<Accumulate<decltype(p), decltype(t)>, double>) run(p, t);
                });
            });
        return ok;
    });
}

}  // namespace

// dtypes: of each latent in the order of the arguments. sizes: the latents' shape [5], the grid [3], then the strides [5] of each
// latent. A null reference gives the plain patch error. out: [N, f, h, w], double if any latent is double, else float.
HALO_EXPORT int halo_patch_forward(const int* dtypes, int threads, const int64_t* sizes, const void* policy, const void* reference,
                                   const void* target, void* out) {
    return by_loops(dtypes[0], dtypes[1], dtypes[2], [&](auto p, auto t) {
        forward<decltype(p), decltype(t)>(Geometry(sizes, sizes + 5), {policy, sizes + 8, dtypes[0]}, {reference, sizes + 13, dtypes[1]},
                                          {target, sizes + 18, dtypes[2]}, out, threads);
    });
}

// Of factor * grad; a null factor is 1. The gradient has the prediction's dtype; factor and grad have that of the sums.
HALO_EXPORT int halo_patch_backward(const int* dtypes, int threads, const int64_t* sizes, const void* factor, const void* grad,
                                    const void* prediction, const void* target, void* gradient) {
    return by_loops(dtypes[0], dtypes[0], dtypes[1], [&](auto p, auto t) {
        backward<decltype(p), decltype(t)>(Geometry(sizes, sizes + 5), factor, grad, {prediction, sizes + 8, dtypes[0]},
                                           {target, sizes + 13, dtypes[1]}, {gradient, sizes + 18, dtypes[0]}, threads);
    });
}

// dtype: of every table, float64 or float32. numbers: those of TableNumbers, in order. Null tables are absent; the outputs are as
// in the reference.
HALO_EXPORT int halo_gran_dpo_table(int dtype, int threads, const int64_t* sizes, const void* log_ratio, const void* patch_rewards,
                                    const void* video_rewards, const void* logit_scale, const void* pair_weight, const void* error,
                                    const void* loser_scale, int link, const double* numbers, void* loss, void* coefficients,
                                    void* video_logits, void* patch_logits, void* active) {
    if (link < 0 || link >= links) return unknown_link;
    TableNumbers values;
    std::memcpy(&values, numbers, sizeof values);
    const auto run = [&](auto number) {
        using A = decltype(number);
        const auto in = [](const void* data) { return static_cast<const A*>(data); };
        const auto out = [](void* data) { return static_cast<A*>(data); };
        table<A>(Geometry(sizes, sizes + 5), in(log_ratio), in(patch_rewards), in(video_rewards), in(logit_scale), in(pair_weight), in(error),
                 in(loser_scale), static_cast<Link>(link), values, out(loss), out(coefficients), out(video_logits),
                 out(patch_logits), out(active), threads);
    };
    return guarded([&] {
        if (dtype == float64) return run(double{}), ok;
        if (dtype == float32) return run(float{}), ok;
        return unknown_dtype;
    });
}

// Restricts the instruction set (0 portable, 1 AVX2, 2 AVX-512) to what the machine has; returns the one in use.
HALO_EXPORT int halo_instruction_set(int wanted) {
    if (wanted >= 0) level = std::min(static_cast<Level>(std::min(wanted, 2)), supported);
    return level;
}

HALO_EXPORT int halo_has_openmp() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
