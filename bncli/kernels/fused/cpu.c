/* Batch norm with the residual add and the activation, forward and backward, on a CPU. (Ioffe & Szegedy 2015, alg. 1)
 *
 * Compiled on first use by cpu.py, once for each element type: -DFP32, -DFP64, -DBF16 or -DFP16.
 *
 * x is (N, C, S), either as planes (contiguous: a channel's values lie in N runs of S) or as rows (channels last: N S
 * rows of C). m = N S values a channel. As planes a thread takes whole channels, so that a channel's values are still
 * in its cache when they are read again; where channels are too few for the threads, and as rows, all threads share all
 * channels: parts of the values are summed apart, the sums joined, and the parts visited again.
 *
 * Sums: float32 in vectors over at most BLOCK values, then float64 (of float64, float64). Squares are taken of
 * differences from a shift, the mean of a part's first values: at least 1/HEAD of them, so that the squares are at most
 * HEAD times what they would be about the part's own mean, and cancellation costs no more than that. Parts are joined
 * by their means and squared deviations (Chan, Golub & LeVeque 1983). How values are cut into parts does not depend on
 * the number of threads: neither does any bit of the result.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined __AVX__
#include <immintrin.h>
#endif

extern int omp_get_thread_num(void), omp_get_num_threads(void); /* omp.h is not always beside the compiler */

/* ---- vectors of LANES values ------------------------------------------------------------------------------------ */

#ifdef FP64
typedef double wide; /* what is computed in */
typedef int64_t integer;
#else
typedef float wide;
typedef int32_t integer;
#endif

#if defined FP64 || !defined __AVX512F__
#define LANES 8 /* where registers are shorter the compiler takes several */
#else
#define LANES 16
#endif

typedef wide lanes __attribute__((vector_size(LANES * sizeof(wide))));
typedef integer integers __attribute__((vector_size(LANES * sizeof(wide)))); /* of a comparison: -1 true, 0 false */

#define INLINE static inline __attribute__((always_inline))

INLINE lanes all(wide value) { return (lanes){} + value; }

INLINE lanes load_wide(const wide *from) {
    lanes v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store_wide(wide *to, lanes v) { memcpy(to, &v, sizeof v); }

INLINE lanes choose(integers which, lanes yes, lanes no) {
    return (lanes)(((integers)yes & which) | ((integers)no & ~which));
}

INLINE integers first(int count) { /* the first `count` lanes */
    integers k;
    for (int i = 0; i < LANES; i++) k[i] = i;
    return k < (integers){} + count;
}

INLINE double total(lanes v) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

/* ---- elements in memory ----------------------------------------------------------------------------------------- */

#if defined FP32 || defined FP64
typedef wide element;
INLINE lanes widened(lanes v) { return v; }
INLINE lanes narrowed(lanes v) { return v; }
typedef lanes packed;
#elif defined FP16
typedef _Float16 element;
typedef element packed __attribute__((vector_size(LANES * sizeof(element))));
#if defined __AVX512F__
INLINE lanes widened(packed v) { return (lanes)_mm512_cvtph_ps((__m256i)v); }
INLINE packed narrowed(lanes v) { return (packed)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined __F16C__
INLINE lanes widened(packed v) { return (lanes)_mm256_cvtph_ps((__m128i)v); }
INLINE packed narrowed(lanes v) { return (packed)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE lanes widened(packed v) { return __builtin_convertvector(v, lanes); }
INLINE packed narrowed(lanes v) { return __builtin_convertvector(v, packed); }
#endif
#elif defined BF16
typedef uint16_t element;
typedef element packed __attribute__((vector_size(LANES * sizeof(element))));
typedef uint32_t unsigneds __attribute__((vector_size(LANES * sizeof(wide))));
INLINE lanes widened(packed v) { return (lanes)(__builtin_convertvector(v, unsigneds) << 16); }
INLINE packed narrowed(lanes v) { /* to nearest, ties to even; a NaN stays one */
    unsigneds bits = (unsigneds)v, odd = (bits >> 16) & 1, nan = (unsigneds)(v != v);
    unsigneds rounded = (bits + 0x7fff + odd) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), packed);
}
#endif

INLINE lanes load(const element *from) {
    packed v;
    memcpy(&v, from, sizeof v);
    return widened(v);
}

INLINE void store(element *to, lanes v) {
    packed p = narrowed(v);
    memcpy(to, &p, sizeof p);
}

INLINE lanes load_few(const element *from, int count) { /* zero in the other lanes */
#if defined __AVX512F__ && defined FP32
    return (lanes)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#elif defined __AVX512F__ && defined FP64
    return (lanes)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), from);
#elif defined __AVX512BW__ && defined __AVX512VL__
    return widened((packed)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from));
#else
    packed v = {};
    memcpy(&v, from, count * sizeof(element));
    return widened(v);
#endif
}

INLINE void store_few(element *to, lanes v, int count) {
#if defined __AVX512F__ && defined FP32
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)v);
#elif defined __AVX512F__ && defined FP64
    _mm512_mask_storeu_pd(to, (__mmask8)((1u << count) - 1), (__m512d)v);
#elif defined __AVX512BW__ && defined __AVX512VL__
    _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1), (__m256i)narrowed(v));
#else
    packed p = narrowed(v);
    memcpy(to, &p, count * sizeof(element));
#endif
}

/* ---- a bit an element ------------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t *at;
    uint64_t bits;
    int held;
} stream;

INLINE unsigned to_bits(integers which) {
#if defined __AVX512DQ__ && !defined FP64
    return _mm512_movepi32_mask((__m512i)which);
#elif defined __AVX512DQ__
    return _mm512_movepi64_mask((__m512i)which);
#elif defined __AVX__ && !defined FP64
    return (unsigned)_mm256_movemask_ps((__m256)which);
#else
    unsigned bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (unsigned)(which[i] & 1) << i;
    return bits;
#endif
}

INLINE integers from_bits(unsigned bits) {
    integers bit;
    for (int i = 0; i < LANES; i++) bit[i] = (integer)1 << i;
    return (((integers){} + (integer)bits) & bit) != 0;
}

INLINE void put(stream *s, integers which, int count) {
    if (count == LANES && s->held == 0) { /* whole bytes, as nearly always */
        const unsigned bits = to_bits(which);
        memcpy(s->at, &bits, LANES / 8);
        s->at += LANES / 8;
        return;
    }
    s->bits |= (uint64_t)(to_bits(which) & ((1u << count) - 1)) << s->held;
    for (s->held += count; s->held >= 8; s->held -= 8, s->bits >>= 8) *s->at++ = (uint8_t)s->bits;
}

INLINE void finish(stream *s) { /* the last byte, if it is not full */
    if (s->held > 0) *s->at = (uint8_t)s->bits;
}

INLINE integers take(stream *s, int count) {
    if (count == LANES && s->held == 0) {
        unsigned bits = 0;
        memcpy(&bits, s->at, LANES / 8);
        s->at += LANES / 8;
        return from_bits(bits);
    }
    for (; s->held < count; s->held += 8) s->bits |= (uint64_t)*s->at++ << s->held;
    integers which = from_bits((unsigned)s->bits & ((1u << count) - 1));
    s->bits >>= count;
    s->held -= count;
    return which;
}

/* ---- activations ------------------------------------------------------------------------------------------------ */

enum { NONE, RELU, LEAKY_RELU, SILU };
static const wide SLOPE = (wide)0.01;

#ifdef FP64
INLINE lanes exponential(lanes v) {
    for (int i = 0; i < LANES; i++) v[i] = exp(v[i]);
    return v;
}
#else
INLINE lanes exponential(lanes v) { /* 2^n e^r with |r| <= ln(2)/2; within 2 units in the last place */
    const wide most = 88.0f, least = -87.0f, round = 12582912.0f; /* 1.5 2^23: adding it leaves an integer */
    v = choose(v > most, all(most), choose(v < least, all(least), v));
    lanes n = (v * 1.44269504f + round) - round;
    lanes r = (v - n * 0.693359375f) - n * -2.12194440e-4f; /* ln 2 in two pieces, the first exact */
    lanes p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    integers power = (__builtin_convertvector(n, integers) + 127) << 23;
    return p * (lanes)power;
}
#endif

INLINE lanes activated(const int activation, lanes z) {
    if (activation == RELU) return (lanes)((integers)z & ~(z <= 0)); /* a NaN stays one */
    if (activation == LEAKY_RELU) return choose(z > 0, z, z * SLOPE);
    if (activation == SILU) return z / (1 + exponential(-z));
    return z;
}

/* Where dy passes whole. At a NaN as in torch: relu stops dy where z <= 0, leaky_relu scales it unless z > 0. */
INLINE integers passes(const int activation, lanes z) { return activation == RELU ? ~(z <= 0) : z > 0; }

INLINE lanes through_sign(const int activation, lanes dy, integers whole) {
    return activation == RELU ? (lanes)((integers)dy & whole) : choose(whole, dy, dy * SLOPE);
}

INLINE lanes through_silu(lanes dy, lanes z) {
    lanes s = 1 / (1 + exponential(-z));
    return dy * (s * (1 + z * (1 - s)));
}

/* ---- what is asked ---------------------------------------------------------------------------------------------- */

typedef struct {
    const element *x, *residual, *dy;
    element *y, *dx, *dresidual;
    const wide *weight, *bias; /* (C), or null: 1 and 0 */
    wide *mean, *var;          /* (C); frozen: read, else written forward and read backward */
    wide *running_mean, *running_var;
    wide *dweight, *dbias;
    uint8_t *signs; /* where dy passes an activation whole, or null */
    int64_t examples, channels, positions, rows, activation, frozen, threads;
    double eps, momentum;
} call;

enum {
    BLOCK = 4096,         /* values that are summed in float32 */
    PART = 65536,         /* values of a channel whose sums are joined at a time */
    HEAD = 16,            /* 1/HEAD of a part gives its shift */
    FORESEEN = 512,       /* bytes of a run that are asked for before it begins */
    CACHE = 2 << 20,      /* bytes, about: a core's own */
    HUGE_FROM = 32 << 20, /* bytes, above which glibc maps each allocation anew (mallopt(3), M_MMAP_THRESHOLD) */
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }

typedef struct { /* of some values: how many, their mean, and the sum of their squared deviations from it */
    double count, mean, squares;
} moments;

INLINE moments join(moments a, moments b) {
    double count = a.count + b.count, apart = b.mean - a.mean;
    if (b.count == 0) return a;
    double between = apart * apart * a.count * b.count / count;
    return (moments){count, a.mean + apart * b.count / count, a.squares + b.squares + between};
}

INLINE moments about(double shift, double count, double sum, double squares) { /* sums of differences from the shift */
    double mean = sum / count, about_mean = squares - sum * mean;
    return (moments){count, shift + mean, about_mean < 0 ? 0 : about_mean}; /* a NaN stays one */
}

typedef struct { /* of a channel; z = (x - mean) scale + shift, dx = scale g - (x - mean) slope - constant */
    wide mean, scale, shift, slope, constant;
} channel;

INLINE channel prepared(const call *c, int64_t k) {
    double weight = c->weight ? c->weight[k] : 1, reciprocal = 1 / sqrt((double)c->var[k] + c->eps);
    return (channel){c->mean[k], (wide)(weight * reciprocal), c->bias ? c->bias[k] : 0, 0, 0};
}

static channel settled(const call *c, int64_t k, moments found) { /* what forward says and needs of a channel */
    if (!c->frozen) {
        double var = found.squares / found.count;
        c->mean[k] = (wide)found.mean;
        c->var[k] = (wide)var;
        if (c->running_mean) {
            double unbiased = found.squares / (found.count - 1), old = 1 - c->momentum;
            c->running_mean[k] = (wide)(old * c->running_mean[k] + c->momentum * found.mean);
            c->running_var[k] = (wide)(old * c->running_var[k] + c->momentum * unbiased);
        }
    }
    return prepared(c, k);
}

typedef struct { /* of a channel: of dz, and of dz (x - mean) */
    double g, g_apart;
} sums;

static channel prepared_backward(const call *c, int64_t k, sums found) {
    channel p = prepared(c, k);
    if (!c->frozen) {
        const double m = (double)(c->examples * c->positions);
        p.constant = (wide)(p.scale * found.g / m);
        p.slope = (wide)(p.scale * found.g_apart / m / ((double)c->var[k] + c->eps));
    }
    return p;
}

static void settle_gradients(const call *c, int64_t k, sums found) {
    c->dbias[k] = (wide)found.g;
    c->dweight[k] = (wide)(found.g_apart / sqrt((double)c->var[k] + c->eps));
}

/* ---- planes: values i of a channel, i = n S + s ----------------------------------------------------------------- */

typedef struct {
    int64_t at, length, left; /* offset of its first value, its values, and those of the range after it */
} run;

INLINE run run_from(const call *c, int64_t k, int64_t from, int64_t to) {
    int64_t n = from / c->positions, s = from % c->positions;
    int64_t length = smaller(c->positions - s, to - from);
    return (run){(n * c->channels + k) * c->positions + s, length, to - from - length};
}

INLINE run next(const call *c, run r) {
    int64_t plane = c->positions, past = r.at + r.length;
    int64_t length = smaller(plane, r.left);
    return (run){past + (c->channels - 1) * plane, length, r.left - length};
}

/* The hardware foresees the lines of a run, not where the next run begins: its first lines are asked for here. */
INLINE void foresee(const call *c, run r, const element *first) {
    const char *from = (const char *)(first + r.at + c->channels * c->positions);
    const int64_t bytes = smaller(c->positions * (int64_t)sizeof(element), FORESEEN);
    if (bytes < FORESEEN / 2) return; /* it ends in the same cache line as the next channel begins */
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

#define EACH_RUN(r, c, k, from, to) (run r = run_from(c, k, from, to); r.length > 0; r = next(c, r))

/* Each vector of `length` values: its body sees j, where it begins, and count, the lanes that hold values. */
#define EACH_VECTOR(length, ...)                                                                   \
    {                                                                                              \
        int64_t j = 0;                                                                             \
        REST_OF_VECTORS(length, __VA_ARGS__)                                                       \
    }

#define REST_OF_VECTORS(length, ...)                                                               \
    for (; j + LANES <= (length); j += LANES) { const int count = LANES; __VA_ARGS__ }             \
    if (j < (length)) { const int count = (int)((length) - j); __VA_ARGS__ }

/* The same four at a time, for sums: its body sees u too, the one of four accumulators that is its own. */
#define EACH_OF_FOUR(length, ...)                                                                  \
    {                                                                                              \
        int64_t j = 0;                                                                             \
        while (j + 4 * LANES <= (length)) {                                                        \
            { const int count = LANES, u = 0; __VA_ARGS__ } j += LANES;                            \
            { const int count = LANES, u = 1; __VA_ARGS__ } j += LANES;                            \
            { const int count = LANES, u = 2; __VA_ARGS__ } j += LANES;                            \
            { const int count = LANES, u = 3; __VA_ARGS__ } j += LANES;                            \
        }                                                                                          \
        REST_OF_VECTORS(length, const int u = 0; __VA_ARGS__)                                      \
    }

#define LOAD(from) (count == LANES ? load(from) : load_few(from, count))
#define STORE(to, v) (count == LANES ? store(to, v) : store_few(to, v, count))
#define ONLY_VALUES(v) (count == LANES ? (v) : (lanes)((integers)(v) & first(count)))

static double plane_sum(const call *c, int64_t k, int64_t from, int64_t to) {
    double sum = 0;
    for (int64_t block = from; block < to; block += BLOCK) {
        lanes s[4] = {};
        for EACH_RUN (r, c, k, block, smaller(block + BLOCK, to)) {
            const element *x = c->x + r.at;
            EACH_OF_FOUR(r.length, s[u] += LOAD(x + j);)
        }
        sum += total((s[0] + s[1]) + (s[2] + s[3]));
    }
    return sum;
}

static moments plane_moments(const call *c, int64_t k, int64_t from, int64_t to) {
    int64_t head = pieces(to - from, HEAD);
    wide shift = (wide)(plane_sum(c, k, from, from + head) / head);
    double sum = 0, squares = 0;
    for (int64_t block = from; block < to; block += BLOCK) {
        lanes s[4] = {}, q[4] = {};
        for EACH_RUN (r, c, k, block, smaller(block + BLOCK, to)) {
            const element *x = c->x + r.at;
            foresee(c, r, c->x);
            EACH_OF_FOUR(r.length, {
                lanes apart = ONLY_VALUES(LOAD(x + j) - shift);
                s[u] += apart;
                q[u] += apart * apart;
            })
        }
        sum += total((s[0] + s[1]) + (s[2] + s[3]));
        squares += total((q[0] + q[1]) + (q[2] + q[3]));
    }
    return about(shift, (double)(to - from), sum, squares);
}

INLINE stream plane_signs(const call *c, int64_t k, int64_t from) {
    const int64_t bytes = pieces(c->examples * c->positions, 8);
    return (stream){c->signs ? c->signs + k * bytes + from / 8 : 0, 0, 0};
}

INLINE void plane_forward(const int activation, const call *c, int64_t k, int64_t from, int64_t to, channel p) {
    stream signs = plane_signs(c, k, from);
    const lanes mean = all(p.mean), scale = all(p.scale), shift = all(p.shift);
    for EACH_RUN (r, c, k, from, to) {
        const element *x = c->x + r.at, *residual = c->residual ? c->residual + r.at : 0;
        element *y = c->y + r.at;
        foresee(c, r, c->x), foresee(c, r, c->y);
        if (residual) foresee(c, r, c->residual);
        EACH_VECTOR(r.length, {
            lanes z = (LOAD(x + j) - mean) * scale + shift;
            if (residual) z += LOAD(residual + j);
            if (signs.at) put(&signs, passes(activation, z), count);
            STORE(y + j, activated(activation, z));
        })
    }
    if (signs.at) finish(&signs);
}

/* dy through the activation; x, dy, signs and residual are those of this vector. */
#define UPSTREAM(dy, z)                                                                            \
    (activation == NONE   ? (dy)                                                                   \
     : activation == SILU ? through_silu(dy, z)                                                    \
                          : through_sign(activation, dy, signs.at ? take(&signs, count) : passes(activation, z)))

#define BEFORE_ACTIVATION(apart) ((apart) * scale + shift + (residual ? LOAD(residual + j) : all(0)))

INLINE void plane_sums(const int activation, const call *c, int64_t k, int64_t from, int64_t to, sums *found) {
    const channel p = prepared(c, k);
    stream signs = plane_signs(c, k, from);
    const lanes mean = all(p.mean), scale = all(p.scale), shift = all(p.shift);
    for (int64_t block = from; block < to; block += BLOCK) {
        lanes s[4] = {}, q[4] = {};
        for EACH_RUN (r, c, k, block, smaller(block + BLOCK, to)) {
            const element *x = c->x + r.at, *dy = c->dy + r.at, *residual = c->residual ? c->residual + r.at : 0;
            foresee(c, r, c->x), foresee(c, r, c->dy);
            EACH_OF_FOUR(r.length, {
                lanes apart = LOAD(x + j) - mean;
                lanes g = LOAD(dy + j);
                g = UPSTREAM(g, BEFORE_ACTIVATION(apart));
                s[u] += g;
                q[u] += ONLY_VALUES(g * apart);
            })
        }
        found->g += total((s[0] + s[1]) + (s[2] + s[3]));
        found->g_apart += total((q[0] + q[1]) + (q[2] + q[3]));
    }
}

INLINE void plane_backward(const int activation, const call *c, int64_t k, int64_t from, int64_t to, channel p) {
    stream signs = plane_signs(c, k, from);
    const lanes mean = all(p.mean), scale = all(p.scale), shift = all(p.shift);
    const lanes slope = all(p.slope), constant = all(p.constant);
    for EACH_RUN (r, c, k, from, to) {
        const element *x = c->x + r.at, *dy = c->dy + r.at, *residual = c->residual ? c->residual + r.at : 0;
        element *dx = c->dx + r.at, *dresidual = c->dresidual ? c->dresidual + r.at : 0;
        foresee(c, r, c->x), foresee(c, r, c->dy), foresee(c, r, c->dx);
        EACH_VECTOR(r.length, {
            lanes apart = LOAD(x + j) - mean;
            lanes g = LOAD(dy + j);
            g = UPSTREAM(g, BEFORE_ACTIVATION(apart));
            if (dresidual) STORE(dresidual + j, g);
            STORE(dx + j, c->frozen ? g * scale : g * scale - apart * slope - constant); /* a NaN times 0 is one */
        })
    }
}

/* An activation's own body of a loop: what differs is decided before the loop, not in it. */
#define EACH_ACTIVATION(call_, FUNCTION, ...)                                                      \
    switch ((call_)->activation) {                                                                 \
    case RELU: FUNCTION(RELU, __VA_ARGS__); break;                                                 \
    case LEAKY_RELU: FUNCTION(LEAKY_RELU, __VA_ARGS__); break;                                     \
    case SILU: FUNCTION(SILU, __VA_ARGS__); break;                                                 \
    default: FUNCTION(NONE, __VA_ARGS__);                                                          \
    }

static void forward_plane(const call *c, int64_t k, int64_t from, int64_t to, channel p) {
    EACH_ACTIVATION(c, plane_forward, c, k, from, to, p)
}

static sums sums_of_plane(const call *c, int64_t k, int64_t from, int64_t to) {
    sums found = {0, 0};
    EACH_ACTIVATION(c, plane_sums, c, k, from, to, &found)
    return found;
}

static void backward_plane(const call *c, int64_t k, int64_t from, int64_t to, channel p) {
    EACH_ACTIVATION(c, plane_backward, c, k, from, to, p)
}

/* Whether each thread takes whole channels: one fits in its cache, and all threads have about as much to do. */
INLINE int whole_channels(const call *c) {
    const int64_t m = c->examples * c->positions;
    if (m * (int64_t)sizeof(element) > CACHE) return 0;
    return c->threads == 1 || c->channels >= 4 * c->threads || m <= PART;
}

/* Where channels are in parts, the second visit goes through memory in order, plane after plane; part after part where
 * planes are short, or a byte of signs would belong to two. Its jobs, and the values from..to of channel k of one. */
INLINE int by_planes(const call *c) { return c->positions >= BLOCK / 4 && (!c->signs || c->positions % 8 == 0); }

INLINE int64_t second_jobs(const call *c) {
    return c->channels * (by_planes(c) ? c->examples : pieces(c->examples * c->positions, PART));
}

INLINE void second_job(const call *c, int64_t job, int64_t *k, int64_t *from, int64_t *to) {
    const int64_t m = c->examples * c->positions, parts = pieces(m, PART);
    *k = by_planes(c) ? job % c->channels : job / parts;
    *from = by_planes(c) ? job / c->channels * c->positions : job % parts * PART;
    *to = smaller(m, *from + (by_planes(c) ? c->positions : PART));
}

static void planes_forward(const call *c, moments *partial) {
    const int64_t m = c->examples * c->positions, parts = pieces(m, PART);
    if (whole_channels(c)) {
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < c->channels; k++) {
            moments found = {0, 0, 0};
            for (int64_t part = 0; part < parts && !c->frozen; part++)
                found = join(found, plane_moments(c, k, part * PART, smaller(m, (part + 1) * PART)));
            const channel p = settled(c, k, found);
            for (int64_t part = parts - 1; part >= 0; part--) /* what was read last is still in the cache */
                forward_plane(c, k, part * PART, smaller(m, (part + 1) * PART), p);
        }
        return;
    }
    if (!c->frozen) {
#pragma omp for schedule(static)
        for (int64_t job = 0; job < c->channels * parts; job++) {
            int64_t k = job / parts, from = job % parts * PART;
            partial[job] = plane_moments(c, k, from, smaller(m, from + PART));
        }
    }
#pragma omp single
    for (int64_t k = 0; k < c->channels; k++) {
        moments found = {0, 0, 0};
        for (int64_t part = 0; part < parts && !c->frozen; part++) found = join(found, partial[k * parts + part]);
        settled(c, k, found);
    }
#pragma omp for schedule(static) nowait
    for (int64_t job = 0; job < second_jobs(c); job++) {
        int64_t k, from, to;
        second_job(c, job, &k, &from, &to);
        forward_plane(c, k, from, to, prepared(c, k));
    }
}

static sums added(sums a, sums b) { return (sums){a.g + b.g, a.g_apart + b.g_apart}; }

static void planes_backward(const call *c, sums *partial) {
    const int64_t m = c->examples * c->positions, parts = pieces(m, PART);
    if (whole_channels(c)) {
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < c->channels; k++) {
            sums found = {0, 0};
            for (int64_t part = 0; part < parts; part++)
                found = added(found, sums_of_plane(c, k, part * PART, smaller(m, (part + 1) * PART)));
            settle_gradients(c, k, found);
            const channel p = prepared_backward(c, k, found);
            for (int64_t part = parts - 1; part >= 0; part--)
                backward_plane(c, k, part * PART, smaller(m, (part + 1) * PART), p);
        }
        return;
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < c->channels * parts; job++) {
        int64_t k = job / parts, from = job % parts * PART;
        partial[job] = sums_of_plane(c, k, from, smaller(m, from + PART));
    }
#pragma omp single
    for (int64_t k = 0; k < c->channels; k++) {
        sums found = {0, 0};
        for (int64_t part = 0; part < parts; part++) found = added(found, partial[k * parts + part]);
        settle_gradients(c, k, found);
        partial[k * parts] = found;
    }
#pragma omp for schedule(static) nowait
    for (int64_t job = 0; job < second_jobs(c); job++) {
        int64_t k, from, to;
        second_job(c, job, &k, &from, &to);
        backward_plane(c, k, from, to, prepared_backward(c, k, partial[k * parts]));
    }
}

/* ---- rows ---------------------------------------------------------------------------------------------------------
 *
 * Several rows side by side are one line of `width` columns, so that few channels fill vectors too: column j is channel
 * j % C. The last line may be short.
 */

typedef struct {
    int64_t width, lines, per_part, parts;
    double *sums;                                  /* (parts, 2, width) */
    wide *mean, *scale, *shift, *slope, *constant; /* (width), of each column's channel */
} table;

enum { WIDTH_FROM = 64, LINES = 64, LARGEST_PART = 1 << 18, ABREAST = 4, COLUMNS = 64 };

static int64_t greatest_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_divisor(b, a % b); }

static table tabled(const call *c) {
    const int64_t rows = c->examples * c->positions;
    int64_t side_by_side = 1;
    if (c->channels < WIDTH_FROM && !(c->signs && c->channels % 8)) { /* of signs a row takes whole bytes */
        int64_t whole = LANES / greatest_divisor(c->channels, LANES); /* rows that fill whole vectors */
        side_by_side = smaller(rows, pieces(pieces(WIDTH_FROM, c->channels), whole) * whole);
    }
    table t = {.width = side_by_side * c->channels, .lines = pieces(rows, side_by_side)};
    for (t.parts = 1; rows * c->channels > t.parts * LARGEST_PART && t.parts * ABREAST < t.lines;) t.parts *= 2;
    t.per_part = pieces(t.lines, t.parts); /* as many parts as a power of two: as many threads have the same to do */
    t.parts = pieces(t.lines, t.per_part);
    return t;
}

INLINE int64_t line_length(const call *c, const table *t, int64_t line) {
    return smaller(t->width, c->examples * c->positions * c->channels - line * t->width);
}

INLINE stream line_signs(const call *c, const table *t, int64_t line) {
    return (stream){c->signs ? c->signs + line * (t->width / c->channels) * pieces(c->channels, 8) : 0, 0, 0};
}

/* Each of 1 or ABREAST lines: its body sees i. */
#define EACH_LINE(lines, ...)                                                                      \
    {                                                                                              \
        { const int i = 0; __VA_ARGS__ }                                                           \
        if ((lines) == ABREAST) {                                                                  \
            { const int i = 1; __VA_ARGS__ }                                                       \
            { const int i = 2; __VA_ARGS__ }                                                       \
            { const int i = 3; __VA_ARGS__ }                                                       \
        }                                                                                          \
    }

/* Into s and q, which follow the shift: sums of some lines' differences from the shift, and of their squares. */
INLINE void lines_moments(const int lines, const element *x, int64_t width, int64_t length, wide *shift) {
    wide *s = shift + width + LANES, *q = s + width + LANES;
    EACH_VECTOR(length, {
        const lanes about_this = load_wide(shift + j);
        lanes sum = load_wide(s + j), squares = load_wide(q + j);
        EACH_LINE(lines, {
            lanes apart = ONLY_VALUES(LOAD(x + i * width + j) - about_this);
            sum += apart;
            squares += apart * apart;
        })
        store_wide(s + j, sum);
        store_wide(q + j, squares);
    })
}

static void flush(int64_t width, double *into, wide *from) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        into[j] += from[j];
        from[j] = 0;
    }
}

/* Sums of differences from the shift become means, sums of their squares those of squared deviations from the mean. */
static void columns_about(int64_t from, int64_t to, double count, const wide *shift, double *sum, double *squares) {
    const double part = count > 0 ? 1 / count : 0;
#pragma omp simd
    for (int64_t j = from; j < to; j++) {
        double mean = sum[j] * part, rest = squares[j] - sum[j] * mean;
        sum[j] = shift[j] + mean;
        squares[j] = rest < 0 ? 0 : rest;
    }
}

/* Moments of columns from..to: of `count` values each, joined into those of `before`; squares lie `width` after. */
static void columns_join(
    int64_t from, int64_t to, int64_t width, double before, double count, double *first, const double *other
) {
    const double share = count / (before + count), weight = before * share;
#pragma omp simd
    for (int64_t j = from; j < to; j++) {
        double apart = other[j] - first[j];
        first[j] += apart * share;
        first[width + j] += other[width + j] + apart * apart * weight;
    }
}

/* Sums over the lines of a part into t->sums, as differences from a shift; then each column's mean and squares. */
static void rows_moments(const call *c, const table *t, int64_t part, wide *scratch) {
    const int64_t width = t->width, padded = width + LANES;
    const int64_t from = part * t->per_part, to = smaller(t->lines, from + t->per_part), head = pieces(to - from, HEAD);
    wide *shift = scratch, *s = scratch + padded, *q = scratch + 2 * padded;
    double *mean = t->sums + part * 2 * width, *squares = mean + width;
    memset(scratch, 0, 3 * padded * sizeof(wide));
    memset(mean, 0, 2 * width * sizeof(double));
    for (int64_t line = from; line < from + head; line++) {
        const element *x = c->x + line * width;
        EACH_VECTOR(line_length(c, t, line), store_wide(shift + j, load_wide(shift + j) + LOAD(x + j));)
    }
    for (int64_t j = 0; j < width; j++) shift[j] /= head;
    for (int64_t block = from; block < to; block += LINES) {
        int64_t line = block, end = smaller(block + LINES, to), whole = end - (line_length(c, t, end - 1) < width);
        for (; line + ABREAST <= whole; line += ABREAST)
            lines_moments(ABREAST, c->x + line * width, width, width, scratch);
        for (; line < end; line++) lines_moments(1, c->x + line * width, width, line_length(c, t, line), scratch);
        flush(width, mean, s);
        flush(width, squares, q);
    }
    const int64_t last = line_length(c, t, to - 1); /* the columns after it have a value less */
    columns_about(0, last, (double)(to - from), shift, mean, squares);
    columns_about(last, width, (double)(to - from - 1), shift, mean, squares);
}

/* Moments of columns from..to of the parts, joined into those of the first. */
static void columns_joined(const call *c, const table *t, int64_t from, int64_t to) {
    const int64_t last = line_length(c, t, t->lines - 1);
    double *first = t->sums;
    for (int64_t part = 1; part < t->parts; part++) {
        const double *other = t->sums + part * 2 * t->width;
        const double before = (double)(part * t->per_part);
        const double count = (double)smaller(t->lines, (part + 1) * t->per_part) - before;
        const int64_t middle = part == t->parts - 1 ? larger(from, smaller(last, to)) : to;
        columns_join(from, middle, t->width, before, count, first, other);
        columns_join(middle, to, t->width, before, count - 1, first, other);
    }
}

static void columns_added(const table *t, int64_t from, int64_t to) {
    for (int64_t part = 1; part < t->parts; part++)
        for (int64_t half = 0; half < 2; half++) {
            double *first = t->sums + half * t->width;
            const double *other = first + part * 2 * t->width;
#pragma omp simd
            for (int64_t j = from; j < to; j++) first[j] += other[j];
        }
}

/* The parameters of channels from..to for each of their columns. Loops over arrays, for the vector units' roots. */
static void rows_prepare(const call *c, const table *t, int64_t from, int64_t to) {
    for (int64_t k = from; k < to; k++) {
        t->mean[k] = c->mean[k];
        t->scale[k] = c->weight ? c->weight[k] : 1;
        t->shift[k] = c->bias ? c->bias[k] : 0;
    }
#pragma omp simd
    for (int64_t k = from; k < to; k++) t->scale[k] = (wide)(t->scale[k] / sqrt((double)c->var[k] + c->eps));
}

static void rows_repeat(const call *c, const table *t, int64_t from, int64_t to) {
    const int64_t bytes = (to - from) * (int64_t)sizeof(wide);
    for (int64_t j = c->channels + from; j < t->width; j += c->channels) {
        memcpy(t->mean + j, t->mean + from, bytes);
        memcpy(t->scale + j, t->scale + from, bytes);
        memcpy(t->shift + j, t->shift + from, bytes);
        memcpy(t->slope + j, t->slope + from, bytes);
        memcpy(t->constant + j, t->constant + from, bytes);
    }
}

static void rows_settle(const call *c, const table *t, int64_t from, int64_t to) {
    const double m = (double)(c->examples * c->positions), old = 1 - c->momentum;
    double before = (double)t->lines, *mean = t->sums, *squares = mean + t->width;
    const int64_t last = line_length(c, t, t->lines - 1);
    for (int64_t j = c->channels; j < t->width && !c->frozen; j += c->channels) {
        double count = (double)(t->lines - (j >= last));
        columns_join(from, to, t->width, before, count, t->sums, t->sums + j);
        before += count;
    }
    for (int64_t k = from; k < to && !c->frozen; k++) {
        c->mean[k] = (wide)mean[k];
        c->var[k] = (wide)(squares[k] / m);
    }
    for (int64_t k = from; k < to && c->running_mean; k++) {
        c->running_mean[k] = (wide)(old * c->running_mean[k] + c->momentum * mean[k]);
        c->running_var[k] = (wide)(old * c->running_var[k] + c->momentum * (squares[k] / (m - 1)));
    }
    rows_prepare(c, t, from, to);
    rows_repeat(c, t, from, to);
}

static void rows_settle_backward(const call *c, const table *t, int64_t from, int64_t to) {
    const double part = c->frozen ? 0 : 1 / (double)(c->examples * c->positions);
    double *g = t->sums, *g_apart = g + t->width;
    for (int64_t j = c->channels; j < t->width; j += c->channels)
        for (int64_t k = from; k < to; k++) {
            g[k] += g[j + k];
            g_apart[k] += g_apart[j + k];
        }
#pragma omp simd
    for (int64_t k = from; k < to; k++) {
        double reciprocal2 = 1 / ((double)c->var[k] + c->eps);
        c->dbias[k] = (wide)g[k];
        c->dweight[k] = (wide)(g_apart[k] * sqrt(reciprocal2));
        t->constant[k] = (wide)(t->scale[k] * g[k] * part);
        t->slope[k] = (wide)(t->scale[k] * reciprocal2 * g_apart[k] * part);
    }
    rows_repeat(c, t, from, to);
}

INLINE void part_forward(const int activation, const call *c, const table *t, int64_t part) {
    const int64_t from = part * t->per_part, to = smaller(t->lines, from + t->per_part);
    for (int64_t line = from; line < to; line++) {
        const int64_t at = line * t->width;
        const element *x = c->x + at, *residual = c->residual ? c->residual + at : 0;
        element *y = c->y + at;
        stream signs = line_signs(c, t, line);
        EACH_VECTOR(line_length(c, t, line), {
            lanes z = (LOAD(x + j) - load_wide(t->mean + j)) * load_wide(t->scale + j) + load_wide(t->shift + j);
            if (residual) z += LOAD(residual + j);
            if (signs.at) put(&signs, passes(activation, z), count);
            STORE(y + j, activated(activation, z));
        })
        if (signs.at) finish(&signs);
    }
}

#define COLUMN_PARAMETERS                                                                          \
    const lanes mean = load_wide(t->mean + j), scale = load_wide(t->scale + j);                    \
    const lanes shift = load_wide(t->shift + j)

INLINE void lines_sums(
    const int activation, const int lines, const call *c, const table *t, int64_t line, int64_t length, wide *s
) {
    const int64_t width = t->width, at = line * width;
    wide *q = s + width + LANES;
    stream each[ABREAST];
    for (int i = 0; i < lines; i++) each[i] = line_signs(c, t, line + i);
    EACH_VECTOR(length, {
        COLUMN_PARAMETERS;
        lanes sum = load_wide(s + j), product = load_wide(q + j);
        EACH_LINE(lines, {
            stream signs = each[i];
            const element *residual = c->residual ? c->residual + at + i * width : 0;
            lanes apart = LOAD(c->x + at + i * width + j) - mean;
            lanes g = LOAD(c->dy + at + i * width + j);
            g = UPSTREAM(g, BEFORE_ACTIVATION(apart));
            each[i] = signs;
            sum += g;
            product += ONLY_VALUES(g * apart);
        })
        store_wide(s + j, sum);
        store_wide(q + j, product);
    })
}

INLINE void part_sums(const int activation, const call *c, const table *t, int64_t part, wide *scratch) {
    const int64_t width = t->width, padded = width + LANES;
    const int64_t from = part * t->per_part, to = smaller(t->lines, from + t->per_part);
    wide *s = scratch, *q = scratch + padded;
    double *sums = t->sums + part * 2 * width;
    memset(scratch, 0, 2 * padded * sizeof(wide));
    memset(sums, 0, 2 * width * sizeof(double));
    for (int64_t block = from; block < to; block += LINES) {
        int64_t line = block, end = smaller(block + LINES, to), whole = end - (line_length(c, t, end - 1) < width);
        for (; line + ABREAST <= whole; line += ABREAST) lines_sums(activation, ABREAST, c, t, line, width, scratch);
        for (; line < end; line++) lines_sums(activation, 1, c, t, line, line_length(c, t, line), scratch);
        flush(width, sums, s);
        flush(width, sums + width, q);
    }
}

INLINE void part_backward(const int activation, const call *c, const table *t, int64_t part) {
    const int64_t from = part * t->per_part, to = smaller(t->lines, from + t->per_part);
    for (int64_t line = from; line < to; line++) {
        const int64_t at = line * t->width;
        const element *x = c->x + at, *dy = c->dy + at, *residual = c->residual ? c->residual + at : 0;
        element *dx = c->dx + at, *dresidual = c->dresidual ? c->dresidual + at : 0;
        stream signs = line_signs(c, t, line);
        EACH_VECTOR(line_length(c, t, line), {
            COLUMN_PARAMETERS;
            lanes apart = LOAD(x + j) - mean;
            lanes g = LOAD(dy + j);
            g = UPSTREAM(g, BEFORE_ACTIVATION(apart));
            if (dresidual) STORE(dresidual + j, g);
            const lanes slope = load_wide(t->slope + j), constant = load_wide(t->constant + j);
            STORE(dx + j, c->frozen ? g * scale : g * scale - apart * slope - constant);
        })
    }
}

static void forward_part(const call *c, const table *t, int64_t part) {
    EACH_ACTIVATION(c, part_forward, c, t, part)
}

static void sums_of_part(const call *c, const table *t, int64_t part, wide *scratch) {
    EACH_ACTIVATION(c, part_sums, c, t, part, scratch)
}

static void backward_part(const call *c, const table *t, int64_t part) {
    EACH_ACTIVATION(c, part_backward, c, t, part)
}

/* A thread visits its parts twice, the second time from the last, which its cache still holds: not OpenMP's loop. */
INLINE int64_t mine(const table *t, int64_t thread, int64_t threads) { return t->parts * thread / threads; }

static void rows_forward(const call *c, const table *t, wide *scratch, int64_t thread, int64_t threads) {
    const int64_t from = mine(t, thread, threads), to = mine(t, thread + 1, threads);
    for (int64_t part = from; part < to && !c->frozen; part++) rows_moments(c, t, part, scratch);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t j = 0; j < t->width; j += COLUMNS)
        if (!c->frozen) columns_joined(c, t, j, smaller(t->width, j + COLUMNS));
#pragma omp for schedule(static)
    for (int64_t k = 0; k < c->channels; k += COLUMNS) rows_settle(c, t, k, smaller(c->channels, k + COLUMNS));
    for (int64_t part = to - 1; part >= from; part--) forward_part(c, t, part);
}

static void rows_backward(const call *c, const table *t, wide *scratch, int64_t thread, int64_t threads) {
    const int64_t from = mine(t, thread, threads), to = mine(t, thread + 1, threads);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < c->channels; k += COLUMNS) {
        rows_prepare(c, t, k, smaller(c->channels, k + COLUMNS));
        rows_repeat(c, t, k, smaller(c->channels, k + COLUMNS));
    }
    for (int64_t part = from; part < to; part++) sums_of_part(c, t, part, scratch);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t j = 0; j < t->width; j += COLUMNS) columns_added(t, j, smaller(t->width, j + COLUMNS));
#pragma omp for schedule(static)
    for (int64_t k = 0; k < c->channels; k += COLUMNS) rows_settle_backward(c, t, k, smaller(c->channels, k + COLUMNS));
    for (int64_t part = to - 1; part >= from; part--) backward_part(c, t, part);
}

/* ---- entry ------------------------------------------------------------------------------------------------------ */

enum { ALONE_BELOW = 32768 }; /* values that are not worth another thread's waking */

/* A large tensor that has just been allocated is not mapped yet: by 4 KiB pages that would cost as much as the rest. */
static void huge(void *memory, int64_t values) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, from = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t to = ((uintptr_t)memory + values * sizeof(element)) & ~(page - 1);
    if (memory && values * (int64_t)sizeof(element) >= HUGE_FROM) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)memory, (void)values;
#endif
}

static int team(const call *c, int backward) { /* 0, or 1 for lack of memory */
    const int64_t values = c->examples * c->channels * c->positions;
    call own = *c;
    if (values < ALONE_BELOW) own.threads = 1;
    c = &own;
    huge(c->y, values), huge(c->dx, values), huge(c->dresidual, values);
    table t = {0};
    int64_t padded = 0;
    void *memory;
    if (c->rows) {
        t = tabled(c);
        padded = t.width + LANES;
        const int64_t wides = (5 + 3 * c->threads) * padded;
        memory = malloc(t.parts * 2 * t.width * sizeof(double) + wides * sizeof(wide));
        t.sums = memory;
        t.mean = (wide *)(t.sums + t.parts * 2 * t.width);
        t.scale = t.mean + padded, t.shift = t.scale + padded;
        t.slope = t.shift + padded, t.constant = t.slope + padded;
    } else {
        const int64_t parts = pieces(c->examples * c->positions, PART);
        memory = malloc(sizeof(moments) * (whole_channels(c) ? 1 : c->channels * parts));
    }
    if (!memory) return 1;
    wide *scratch = t.constant + padded;
#define WORK(thread, threads)                                                                      \
    {                                                                                              \
        wide *of_thread = scratch + 3 * padded * (thread);                                         \
        if (c->rows && backward) rows_backward(c, &t, of_thread, thread, threads);                 \
        else if (c->rows) rows_forward(c, &t, of_thread, thread, threads);                         \
        else if (backward) planes_backward(c, memory);                                             \
        else planes_forward(c, memory);                                                            \
    }
    if (c->threads == 1) {
        WORK(0, 1)
    } else {
#pragma omp parallel num_threads((int)c->threads)
        WORK(omp_get_thread_num(), omp_get_num_threads())
    }
    free(memory);
    return 0;
}

/* How a call is cut: 0 whole channels, 1 channels in parts, 2 rows in parts. */
int division(const call *c) { return c->rows ? 2 : whole_channels(c) ? 0 : 1; }

int forward(const call *c) { return team(c, 0); }
int backward(const call *c) { return team(c, 1); }
