/* Batch norm with the residual add and the activation, forward and backward, on a CPU. (Ioffe & Szegedy 2015, alg. 1)
 * Compiled on first use by cpu.py, once for each element type: -DFP32, -DFP64, -DBF16 or -DFP16.
 *
 * x is (N, C, S), visited in lines: as planes (contiguous) a line is S values of one channel, or a piece of them; as
 * rows (channels last) it is a row of C values, or several side by side. Each direction visits the lines twice, once to
 * sum and once to write, in parts of some lines. As planes a thread takes whole channels, whose values are still in its
 * cache at the second visit; where channels are too few for the threads, and as rows, the threads share the parts.
 *
 * The first visit reads ABREAST lines at a time, a quarter of a part apart: a core reads more bytes per second from
 * memory in four sequences of addresses than in one. The second writes large results past the caches, which saves
 * reading their cache lines before they are written.
 *
 * Sums: float32 over at most CHUNK values of a line, then float64 (of float64 in float64). Squares are of differences
 * from a shift, the mean of at least 1/HEAD of a part, so that they are at most HEAD times what they would be about the
 * part's own mean, and cancellation costs no more than that. Parts are joined by their means and squared deviations
 * (Chan, Golub & LeVeque 1983). The division into parts does not depend on the number of threads, so no bit does.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __AVX__
#include <immintrin.h>
#endif
extern "C" int omp_get_thread_num(void), omp_get_num_threads(void); // omp.h is not always beside the compiler

namespace {

// ---- vectors of LANES values ---------------------------------------------------------------------------------------
#ifdef FP64
typedef double wide; // the type of all arithmetic
typedef int64_t integer;
#else
typedef float wide;
typedef int32_t integer;
#endif
#if defined FP64 || !defined __AVX512F__
constexpr int LANES = 8; // where registers are shorter the compiler takes several
#else
constexpr int LANES = 16;
#endif
typedef wide lanes __attribute__((vector_size(LANES * sizeof(wide))));
typedef integer integers __attribute__((vector_size(LANES * sizeof(wide)))); // of a comparison: -1 true, 0 false
#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE static inline ALWAYS_INLINE

template <class Vector> INLINE Vector read(const void *from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
}
INLINE void write_lanes(wide *to, lanes v) { memcpy(to, &v, sizeof v); }
INLINE lanes all(wide value) { return lanes{} + value; }
INLINE lanes choose(integers k, lanes yes, lanes no) { return (lanes)(((integers)yes & k) | ((integers)no & ~k)); }
INLINE double total(lanes v) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

// ---- elements in memory --------------------------------------------------------------------------------------------
#if defined FP32 || defined FP64
typedef wide element;
typedef lanes packed;
INLINE lanes widened(lanes v) { return v; }
INLINE lanes narrowed(lanes v) { return v; }
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
#if defined __AVX512BF16__
INLINE packed narrowed(lanes v) { return (packed)_mm512_cvtneps_pbh((__m512)v); } // subnormal results become 0
#else
// To nearest, ties to even. A result of arithmetic that is NaN is a quiet one, which cutting off its end leaves NaN.
INLINE packed narrowed(lanes v) {
    const unsigneds bits = (unsigneds)v, round = 0x7fff + ((bits >> 16) & 1);
    const unsigneds rounded = (bits + (round & (unsigneds)(v == v))) >> 16;
#if defined __AVX2__ && !defined __AVX512F__
    const __m256i words = (__m256i)rounded;
    return (packed)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    return __builtin_convertvector(rounded, packed);
#endif
}
#endif
#endif

// Past the caches; `to` is a multiple of the vector's size, and its cache line is written whole.
INLINE void store_past_caches(element *to, packed p) {
#if defined __AVX__
    if (sizeof p == 16) return _mm_stream_si128((__m128i *)to, read<__m128i>(&p));
    const char *from = (const char *)&p;
    for (size_t i = 0; i < sizeof p / 32; i++) _mm256_stream_si256((__m256i *)to + i, read<__m256i>(from + 32 * i));
#else
    memcpy(to, &p, sizeof p);
#endif
}

// ---- the vectors of a line -----------------------------------------------------------------------------------------
// A vector of a line. The last ends with the line, so that its first lanes repeat values of the vector before. Of a
// line shorter than a vector only the first `held` lanes exist.
template <bool WHOLE> struct span {
    int held = LANES, repeated = 0;
    ALWAYS_INLINE lanes load(const element *from) const {
        packed v = {};
        WHOLE || held == LANES ? memcpy(&v, from, sizeof v) : memcpy(&v, from, held * sizeof(element));
        return widened(v);
    }
    ALWAYS_INLINE void store(element *to, lanes v, bool past_caches) const {
        const packed p = narrowed(v);
        if (WHOLE && past_caches) store_past_caches(to, p);
        else WHOLE || held == LANES ? memcpy(to, &p, sizeof p) : memcpy(to, &p, held * sizeof(element));
    }
    ALWAYS_INLINE lanes only_new(lanes v) const { // 0 in the other lanes
        integers lane = {};
        for (int i = 0; i < LANES; i++) lane[i] = i;
        return WHOLE ? v : (lanes)((integers)v & (lane >= (integers{} + repeated)) & (lane < (integers{} + held)));
    }
};

// body(j, vector) for each vector of the values from..to of a line, j being where it begins in the line.
template <class Body> INLINE void each_vector(int64_t from, int64_t to, Body body) {
    int64_t j = from;
    for (; j + LANES <= to; j += LANES) body(j, span<true>());
    if (j < to && to >= LANES) body(to - LANES, span<false>{LANES, (int)(j - (to - LANES))});
    else if (j < to) body(j, span<false>{(int)(to - j), 0});
}

template <auto V> struct constant { static constexpr auto value = V; }; // as an argument: the value is part of its type
constexpr int ABREAST = 4;
template <class Body> INLINE void each_line(constant<1>, Body body) { body(0); }
template <class Body> INLINE void each_line(constant<ABREAST>, Body body) { body(0), body(1), body(2), body(3); }

// ---- a bit an element ----------------------------------------------------------------------------------------------
INLINE unsigned to_bits(integers which) {
#ifdef __AVX512DQ__
    return sizeof(wide) == 4 ? _mm512_movepi32_mask((__m512i)which) : _mm512_movepi64_mask((__m512i)which);
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
    return ((integers{} + (integer)bits) & bit) != 0;
}
// `held` bits from bit number `at`; the bits before it in its byte stay, those after the last in its byte become 0.
INLINE void put_bits(uint8_t *signs, int64_t at, unsigned bits, int held) {
    uint8_t *byte = signs + at / 8;
    const int before = (int)(at % 8);
    if (held == LANES && before == 0) return (void)memcpy(byte, &bits, LANES / 8);
    bits &= (1u << held) - 1;
    if (before) bits = bits << before | (*byte & ((1u << before) - 1));
    for (int left = before + held; left > 0; left -= 8, bits >>= 8) *byte++ = (uint8_t)bits;
}
INLINE unsigned get_bits(const uint8_t *signs, int64_t at, int held) {
    const int before = (int)(at % 8);
    unsigned bits = 0;
    if (held == LANES && before == 0) memcpy(&bits, signs + at / 8, LANES / 8);
    else for (int i = 0; 8 * i < before + held; i++) bits |= (unsigned)signs[at / 8 + i] << (8 * i);
    return bits >> before;
}

// ---- activations ---------------------------------------------------------------------------------------------------
enum Activation { NONE, RELU, LEAKY_RELU, SILU };
constexpr wide NEGATIVE_SLOPE = (wide)0.01;
#ifdef FP64
INLINE lanes exponential(lanes v) {
    for (int i = 0; i < LANES; i++) v[i] = __builtin_exp(v[i]);
    return v;
}
#else
INLINE lanes exponential(lanes v) { // 2^n e^r with |r| <= ln(2)/2; within 2 units in the last place
    const wide most = 88.0f, least = -87.0f, round = 12582912.0f; // 1.5 2^23: adding it leaves an integer
    v = choose(v > most, all(most), choose(v < least, all(least), v));
    lanes n = (v * 1.44269504f + round) - round;
    lanes r = (v - n * 0.693359375f) - n * -2.12194440e-4f; // ln 2 in two pieces, the first exact
    const lanes p = (((all(1.0f / 5040) * r + 1.0f / 720) * r + 1.0f / 120) * r + 1.0f / 24) * r + 1.0f / 6;
    const integers power = (__builtin_convertvector(n, integers) + 127) << 23;
    return ((p * r + 0.5f) * r * r + r + 1.0f) * (lanes)power;
}
#endif
template <Activation A> INLINE lanes activated(lanes z) {
    if (A == RELU) return (lanes)((integers)z & ~(z <= 0)); // a NaN stays one
    if (A == LEAKY_RELU) return choose(z > 0, z, z * NEGATIVE_SLOPE);
    if (A == SILU) return z / (1 + exponential(-z));
    return z;
}
// Where dy passes unchanged. At a NaN as in torch: relu stops dy where z <= 0, leaky_relu scales it unless z > 0.
template <Activation A> INLINE integers passes(lanes z) { return A == RELU ? ~(z <= 0) : z > 0; }
template <Activation A> INLINE lanes through_sign(lanes dy, integers pass) {
    return A == RELU ? (lanes)((integers)dy & pass) : choose(pass, dy, dy * NEGATIVE_SLOPE);
}
INLINE lanes through_silu(lanes dy, lanes z) {
    const lanes s = 1 / (1 + exponential(-z));
    return dy * (s * (1 + z * (1 - s)));
}

// ---- arguments -----------------------------------------------------------------------------------------------------
struct call { // cpu.py packs it
    const element *x, *residual, *dy;
    element *y, *dx, *dresidual;
    const wide *weight, *bias; // (C), or null: 1 and 0
    wide *mean, *var;          // (C); frozen: read, else written forward and read backward
    wide *running_mean, *running_var, *dweight, *dbias;
    uint8_t *signs; // where dy passes an activation unchanged, or null
    int64_t examples, channels, positions, rows, activation, frozen, threads;
    double eps, momentum;
};
struct task : call { bool past_caches; }; // whether the results are written past the caches
enum {
    CHUNK = 1024,               // values of a line that are summed in float32
    LONGEST = 16384,            // values of a line: longer planes are cut into pieces
    PART = ABREAST * LONGEST,   // values of a channel whose sums are joined at a time, about
    HEAD = 16,                  // 1/HEAD of a part gives its shift
    FORESEEN = 512,             // bytes of a plane that are asked for before it begins
    CACHE = 2 << 20,            // bytes, about: a core's own
    CACHE_LINE = 64,            // bytes
    PAST_CACHES_FROM = 8 << 20, // bytes of a tensor
    HUGE_FROM = 32 << 20,       // bytes, above which glibc maps each allocation anew (mallopt(3), M_MMAP_THRESHOLD)
    ALONE_BELOW = 32768,        // values that are not worth another thread's waking
};
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t pieces(int64_t whole, int64_t piece) { return (whole + piece - 1) / piece; }
INLINE int64_t values_of_channel(const call &c) { return c.examples * c.positions; }

// ---- the sums of a channel -----------------------------------------------------------------------------------------
// Forward they are moments, backward gradients: the functions below that are declared for both do the work of one.
struct moments { double count, first, second; };   // of `count` values: their mean, their squared deviations from it
struct gradients { double count, first, second; }; // count: of a part. Sums of dz, and of dz (x - mean)

INLINE moments joined(moments a, moments b) {
    const double count = a.count + b.count, share = b.count / count, difference = b.first - a.first;
    return {count, a.first + difference * share, a.second + b.second + difference * difference * a.count * share};
}
INLINE gradients joined(gradients a, gradients b) { return {a.count, a.first + b.first, a.second + b.second}; }
INLINE moments about(double shift, double count, double sum, double squares) { // sums of differences from the shift
    const double mean = sum / count, rest = squares - sum * mean;
    return {count, shift + mean, rest < 0 ? 0 : rest}; // a NaN stays one
}
// z = (x - mean) scale + shift, dx = scale dz - (x - mean) slope - constant
enum Parameter { MEAN, SCALE, SHIFT, SLOPE, CONSTANT, PARAMETERS };
struct channel { wide of[PARAMETERS]; };
INLINE double reciprocal_deviation(const call &c, int64_t k) { return 1 / __builtin_sqrt((double)c.var[k] + c.eps); }
INLINE channel normalization(const call &c, int64_t k) {
    const double weight = c.weight ? c.weight[k] : 1;
    return {{c.mean[k], (wide)(weight * reciprocal_deviation(c, k)), c.bias ? c.bias[k] : 0, 0, 0}};
}
INLINE channel settled(const call &c, int64_t k, moments found) {
    if (c.frozen) return normalization(c, k);
    c.mean[k] = (wide)found.first, c.var[k] = (wide)(found.second / found.count);
    if (c.running_mean) {
        const double unbiased = found.second / (found.count - 1), old = 1 - c.momentum;
        c.running_mean[k] = (wide)(old * c.running_mean[k] + c.momentum * found.first);
        c.running_var[k] = (wide)(old * c.running_var[k] + c.momentum * unbiased);
    }
    return normalization(c, k);
}
INLINE channel settled(const call &c, int64_t k, gradients found) {
    const double reciprocal = reciprocal_deviation(c, k);
    c.dbias[k] = (wide)found.first, c.dweight[k] = (wide)(found.second * reciprocal);
    channel p = normalization(c, k);
    if (c.frozen) return p;
    const double m = (double)values_of_channel(c);
    p.of[CONSTANT] = (wide)(p.of[SCALE] * found.first / m);
    p.of[SLOPE] = (wide)(p.of[SCALE] * found.second / m * (reciprocal * reciprocal));
    return p;
}

// ---- a line --------------------------------------------------------------------------------------------------------
struct line { int64_t at, length, bit; }; // offset of its first value, its values, number of its first sign's bit

// A parameter of the values from number j of a line on. One at a time: compilers copy a structure of vectors in memory.
struct uniform { // the values of a line are of one channel
    channel p;
    ALWAYS_INLINE lanes at(Parameter which, int64_t) const { return all(p.of[which]); }
};
struct columns { // value j of a line has the parameters of column j
    wide *of;    // (PARAMETERS, padded)
    int64_t padded;
    ALWAYS_INLINE lanes at(Parameter which, int64_t j) const { return read<lanes>(of + which * padded + j); }
};
struct view { // the tensors from the first value of a line on
    const element *x, *dy, *residual;
    const uint8_t *signs;
    int64_t bit;
};
INLINE view view_of(const call &c, line of) {
    return {c.x + of.at, c.dy + of.at, c.residual ? c.residual + of.at : nullptr, c.signs, of.bit};
}

template <Activation A, class Columns> static void write(const task &c, line of, const Columns columns, moments) {
    const view in = view_of(c, of);
    element *const y = c.y + of.at;
    uint8_t *const signs = c.signs;
    const bool past_caches = c.past_caches;
    each_vector(0, of.length, [=](int64_t j, auto v) ALWAYS_INLINE {
        lanes z = (v.load(in.x + j) - columns.at(MEAN, j)) * columns.at(SCALE, j) + columns.at(SHIFT, j);
        if (in.residual) z += v.load(in.residual + j);
        if (signs) put_bits(signs, in.bit + j, to_bits(passes<A>(z)), v.held);
        v.store(y + j, activated<A>(z), past_caches);
    });
}
// dy through the activation of z = centred scale + shift + residual.
template <Activation A, class Vector, class Columns>
INLINE lanes upstream(const view &in, int64_t j, Vector v, lanes centred, const Columns &columns) {
    const lanes g = v.load(in.dy + j);
    if (A == NONE) return g;
    if (A != SILU && in.signs) return through_sign<A>(g, from_bits(get_bits(in.signs, in.bit + j, v.held)));
    lanes z = centred * columns.at(SCALE, j) + columns.at(SHIFT, j);
    if (in.residual) z += v.load(in.residual + j);
    return A == SILU ? through_silu(g, z) : through_sign<A>(g, passes<A>(z));
}

template <Activation A, class Columns> static void write(const task &c, line of, const Columns columns, gradients) {
    const view in = view_of(c, of);
    element *const dx = c.dx + of.at, *const dresidual = c.dresidual ? c.dresidual + of.at : nullptr;
    const bool past_caches = c.past_caches, frozen = c.frozen;
    each_vector(0, of.length, [=](int64_t j, auto v) ALWAYS_INLINE {
        const lanes centred = v.load(in.x + j) - columns.at(MEAN, j), g = upstream<A>(in, j, v, centred, columns);
        if (dresidual) v.store(dresidual + j, g, past_caches);
        const lanes scale = columns.at(SCALE, j), slope = columns.at(SLOPE, j), constant = columns.at(CONSTANT, j);
        // Frozen, nothing is subtracted: a NaN times 0 is one.
        v.store(dx + j, frozen ? g * scale : g * scale - centred * slope - constant, past_caches);
    });
}
struct terms { lanes first, second; }; // of two sums, for a vector
template <class Columns> struct differences { // from a shift, which is the columns' mean; and their squares
    Columns columns;
    template <class Vector> ALWAYS_INLINE terms at(const view &in, int64_t j, Vector v) const {
        const lanes difference = v.only_new(v.load(in.x + j) - columns.at(MEAN, j));
        return {difference, difference * difference};
    }
};
template <Activation A, class Columns> struct products { // dz, and dz (x - mean)
    Columns columns;
    template <class Vector> ALWAYS_INLINE terms at(const view &in, int64_t j, Vector v) const {
        const lanes centred = v.load(in.x + j) - columns.at(MEAN, j), g = upstream<A>(in, j, v, centred, columns);
        return {v.only_new(g), v.only_new(g * centred)};
    }
};

// add(constant<how many>, lines, from, to), for the values from..to of ABREAST or 1 of the lines first..last, until it
// returns false. of(number): a line.
template <class Line, class Add> INLINE void each_abreast(int64_t first, int64_t last, Line of, Add add) {
    const int64_t quarter = (last - first) / ABREAST;
    for (int64_t step = first; step < first + quarter; step++) {
        const line lines[ABREAST] = {of(step), of(step + quarter), of(step + 2 * quarter), of(step + 3 * quarter)};
        int64_t shortest = lines[0].length;
        for (const line &each : lines) shortest = smaller(shortest, each.length);
        if (!add(constant<ABREAST>(), lines, 0, shortest)) return;
        for (const line &each : lines)
            if (each.length > shortest && !add(constant<1>(), &each, shortest, each.length)) return;
    }
    for (int64_t number = first + ABREAST * quarter; number < last; number++) {
        const line one = of(number);
        if (!add(constant<1>(), &one, 0, one.length)) return;
    }
}
// run(constant<A>) with the activation that is asked for: what differs is decided before the loops, not in them.
template <class Run> INLINE auto with_activation(const call &c, Run run) {
    if (c.activation == RELU) return run(constant<RELU>());
    if (c.activation == LEAKY_RELU) return run(constant<LEAKY_RELU>());
    return c.activation == SILU ? run(constant<SILU>()) : run(constant<NONE>());
}

// ---- planes --------------------------------------------------------------------------------------------------------
struct planes { int64_t pieces_each, piece, lines, per_part, parts; }; // pieces of a plane; their values; a channel's
INLINE planes cut(const call &c) {
    planes g = {pieces(c.positions, LONGEST), smaller(c.positions, LONGEST), 0, 0, 0};
    g.lines = c.examples * g.pieces_each, g.per_part = PART / g.piece / ABREAST * ABREAST;
    // The signs of a part are whole bytes, since another thread may write those of the next.
    if (c.positions % 8) g.per_part = pieces(g.per_part, 8 * g.pieces_each) * 8 * g.pieces_each;
    g.parts = pieces(g.lines, g.per_part);
    return g;
}
INLINE line line_of(const call &c, const planes &g, int64_t k, int64_t number) {
    const int64_t n = g.pieces_each == 1 ? number : number / g.pieces_each;
    const int64_t from = (number - n * g.pieces_each) * g.piece;
    const int64_t bit = k * pieces(values_of_channel(c), 8) * 8 + n * c.positions + from;
    return {(n * c.channels + k) * c.positions + from, smaller(g.piece, c.positions - from), bit};
}

// The hardware foresees the cache lines of a plane, not where the channel's next begins: its first are asked for here.
INLINE void foresee(const call &c, const element *tensor, line of) {
    const int64_t bytes = smaller(c.positions * (int64_t)sizeof(element), FORESEEN);
    if (!tensor || bytes < FORESEEN / 2) return; // shorter ones end in the cache line where the next channel begins
    const char *next = (const char *)(tensor + of.at + c.channels * c.positions);
    for (int64_t at = 0; at < bytes; at += CACHE_LINE) __builtin_prefetch(next + at);
}

struct vector_sums { // of the terms of lines of a channel
    lanes first[ABREAST], second[ABREAST];
    int64_t held, taken; // values of a line in `first`; all values
    double sum, sum2;
    void flush() {
        sum += total((first[0] + first[1]) + (first[2] + first[3]));
        sum2 += total((second[0] + second[1]) + (second[2] + second[3]));
        memset(first, 0, sizeof first), memset(second, 0, sizeof second), held = 0;
    }
    template <int LINES, class Terms>
    void add(const call &c, constant<LINES> abreast, const line *of, int64_t from, int64_t to, const Terms terms_of) {
        lanes a[LINES], b[LINES];
        view in[LINES];
        each_line(abreast, [&](int i) ALWAYS_INLINE { a[i] = first[i], b[i] = second[i], in[i] = view_of(c, of[i]); });
        each_vector(from, to, [&](int64_t j, auto v) ALWAYS_INLINE {
            each_line(abreast, [&](int i) ALWAYS_INLINE {
                const terms t = terms_of.at(in[i], j, v);
                a[i] += t.first, b[i] += t.second;
            });
        });
        each_line(abreast, [&](int i) ALWAYS_INLINE { first[i] = a[i], second[i] = b[i]; });
        taken += LINES * (to - from);
        if ((held += to - from) >= CHUNK) flush();
    }
};

// Sums of the terms of a part's values, until they are at least `most`.
template <class Terms>
static vector_sums sum_part(const call &c, const planes &g, int64_t k, int64_t part, int64_t most, Terms terms_of) {
    vector_sums t = {};
    const int64_t from = part * g.per_part, to = smaller(g.lines, from + g.per_part);
    const auto numbered = [&](int64_t number) { return line_of(c, g, k, number); };
    each_abreast(from, to, numbered, [&](auto lines, const line *of, int64_t begin, int64_t end) {
        each_line(lines, [&](int i) { foresee(c, c.x, of[i]), foresee(c, c.dy, of[i]); });
        for (int64_t j = begin; j < end && t.taken < most; j += CHUNK)
            t.add(c, lines, of, j, smaller(end, j + CHUNK), terms_of);
        return t.taken < most;
    });
    t.flush();
    return t;
}

static void sum_part(const call &c, const planes &g, int64_t k, int64_t part, moments &found) {
    if (c.frozen) return;
    const int64_t lines = smaller(g.lines - part * g.per_part, g.per_part), most = pieces(lines * g.piece, HEAD);
    const vector_sums head = sum_part(c, g, k, part, most, differences<uniform>{});
    const wide shift = (wide)(head.sum / (double)head.taken);
    const vector_sums t = sum_part(c, g, k, part, INT64_MAX, differences<uniform>{{{{shift}}}});
    found = about(shift, (double)t.taken, t.sum, t.sum2);
}
static void sum_part(const call &c, const planes &g, int64_t k, int64_t part, gradients &found) {
    with_activation(c, [&](auto a) {
        const vector_sums t = sum_part(c, g, k, part, INT64_MAX, products<a.value, uniform>{{normalization(c, k)}});
        found = {(double)t.taken, t.sum, t.sum2};
    });
}
template <class Found> INLINE void write_part(const task &c, const planes &g, int64_t k, int64_t part, channel p) {
    with_activation(c, [&](auto activation) {
        for (int64_t number = part * g.per_part; number < smaller(g.lines, (part + 1) * g.per_part); number++) {
            const line of = line_of(c, g, k, number);
            foresee(c, c.x, of), foresee(c, c.dy, of), foresee(c, c.dy ? c.dx : c.y, of);
            if (!c.dy) foresee(c, c.residual, of);
            write<activation.value>(c, of, uniform{p}, Found());
        }
    });
}

// Whether each thread takes whole channels: one fits in its cache, and all threads have about as much to do.
INLINE bool whole_channels(const call &c) {
    const int64_t m = values_of_channel(c);
    return m * (int64_t)sizeof(element) <= CACHE && (c.threads == 1 || c.channels >= 4 * c.threads || m <= PART);
}

template <class Found> static void planes_work(const task &c, const planes &g, Found *partial, channel *of) {
    const auto settle = [&](int64_t k) {
        Found found = partial[k * g.parts];
        for (int64_t part = 1; part < g.parts; part++) found = joined(found, partial[k * g.parts + part]);
        of[k] = settled(c, k, found);
    };
    const int64_t jobs = c.channels * g.parts;
    if (whole_channels(c)) {
#pragma omp for schedule(static) nowait
        for (int64_t k = 0; k < c.channels; k++) {
            for (int64_t part = 0; part < g.parts; part++) sum_part(c, g, k, part, partial[k * g.parts + part]);
            settle(k);
            for (int64_t part = g.parts; part-- > 0;) write_part<Found>(c, g, k, part, of[k]); // from the last: cached
        }
        return;
    }
#pragma omp for schedule(static)
    for (int64_t job = 0; job < jobs; job++) sum_part(c, g, job / g.parts, job % g.parts, partial[job]);
#pragma omp single
    for (int64_t k = 0; k < c.channels; k++) settle(k);
#pragma omp for schedule(static) nowait
    for (int64_t job = 0; job < jobs; job++) write_part<Found>(c, g, job / g.parts, job % g.parts, of[job / g.parts]);
}

// ---- rows: several side by side are one line of `width` columns, so that few channels fill vectors too --------------
struct table { // column j is channel j % C
    int64_t width, lines, per_part, parts;
    double *sums;       // (parts, 2, width): what moments and gradients call first and second
    wide *scratch;      // (threads, 3, padded)
    columns parameters; // of each column's channel
};
enum { WIDTH = 512, FLUSH_EVERY = 16, LARGEST_PART = 1 << 18, COLUMNS = 64 };
static table tabled(const call &c) {
    const int64_t rows = values_of_channel(c);
    int64_t side_by_side = 1;
    if (c.channels < WIDTH && !(c.signs && c.channels % 8)) // of signs a row takes whole bytes
        for (int64_t most = smaller(rows, WIDTH / c.channels); rows % (side_by_side = most); most--) {}
    table t = {};
    t.width = side_by_side * c.channels, t.lines = rows / side_by_side, t.parameters.padded = t.width + LANES;
    for (t.parts = 1; rows * c.channels > t.parts * LARGEST_PART && t.parts * ABREAST < t.lines;) t.parts *= 2;
    t.per_part = pieces(t.lines, t.parts); // as many parts as a power of two: as many threads have the same to do
    t.parts = pieces(t.lines, t.per_part);
    return t;
}
INLINE int64_t lines_before(const table &t, int64_t part) { return smaller(t.lines, part * t.per_part); }
INLINE line line_of(const call &c, const table &t, int64_t number) {
    return {number * t.width, t.width, number * (t.width / c.channels) * pieces(c.channels, 8) * 8};
}

struct column_sums { // of the terms of lines, in each column
    wide *first, *second; // (width)
    double *sum, *sum2;   // (width)
    int64_t width, held;  // columns; how often lines were added to `first`
    void flush() {
#pragma omp simd
        for (int64_t j = 0; j < width; j++) sum[j] += first[j], sum2[j] += second[j], first[j] = second[j] = 0;
        held = 0;
    }
    template <int LINES, class Terms>
    void add(const call &c, constant<LINES> abreast, const line *of, const Terms terms_of) {
        wide *const to_first = first, *const to_second = second;
        view in[LINES];
        each_line(abreast, [&](int i) ALWAYS_INLINE { in[i] = view_of(c, of[i]); });
        each_vector(0, width, [&](int64_t j, auto v) ALWAYS_INLINE {
            lanes a = read<lanes>(to_first + j), b = read<lanes>(to_second + j);
            each_line(abreast, [&](int i) ALWAYS_INLINE {
                const terms t = terms_of.at(in[i], j, v);
                a += t.first, b += t.second;
            });
            write_lanes(to_first + j, a), write_lanes(to_second + j, b);
        });
        if (++held >= FLUSH_EVERY) flush();
    }
};

// Sums of the terms of a part's lines, until they are at least `most`, into its sums. Returns how many lines they are.
template <class Terms>
static int64_t sum_part(const call &c, const table &t, int64_t part, int64_t most, wide *scratch, Terms terms_of) {
    double *const sum = t.sums + part * 2 * t.width;
    column_sums sums = {scratch, scratch + t.parameters.padded, sum, sum + t.width, t.width, 0};
    memset(scratch, 0, 2 * t.parameters.padded * sizeof(wide)), memset(sum, 0, 2 * t.width * sizeof(double));
    int64_t taken = 0;
    const auto numbered = [&](int64_t number) { return line_of(c, t, number); };
    const int64_t from = lines_before(t, part), to = lines_before(t, part + 1);
    each_abreast(from, to, numbered, [&](auto lines, const line *of, int64_t, int64_t) {
        sums.add(c, lines, of, terms_of);
        return (taken += lines.value) < most;
    });
    sums.flush();
    return taken;
}

static void sum_part(const call &c, const table &t, int64_t part, wide *scratch, moments) {
    if (c.frozen) return;
    wide *const shift = scratch + 2 * t.parameters.padded;
    double *const sum = t.sums + part * 2 * t.width, *const squares = sum + t.width;
    const int64_t lines = lines_before(t, part + 1) - lines_before(t, part);
    const differences<columns> terms_of{columns{shift, 0}};
    memset(shift, 0, t.parameters.padded * sizeof(wide));
    const int64_t head = sum_part(c, t, part, pieces(lines, HEAD), scratch, terms_of);
    for (int64_t j = 0; j < t.width; j++) shift[j] = (wide)(sum[j] / (double)head);
    sum_part(c, t, part, INT64_MAX, scratch, terms_of);
#pragma omp simd
    for (int64_t j = 0; j < t.width; j++) {
        const moments found = about(shift[j], (double)lines, sum[j], squares[j]);
        sum[j] = found.first, squares[j] = found.second;
    }
}
static void sum_part(const call &c, const table &t, int64_t part, wide *scratch, gradients) {
    const columns of = t.parameters;
    with_activation(c, [&](auto a) { sum_part(c, t, part, INT64_MAX, scratch, products<a.value, columns>{of}); });
}

// Sums of columns from..to of the parts, joined into those of the first.
template <class Found> static void join_parts(const table &t, int64_t from, int64_t to) {
    double *const first = t.sums, *const second = first + t.width;
    for (int64_t part = 1; part < t.parts; part++) {
        const double before = (double)lines_before(t, part), lines = (double)lines_before(t, part + 1) - before;
        const double *const other = first + part * 2 * t.width;
#pragma omp simd
        for (int64_t j = from; j < to; j++) {
            const Found f = joined(Found{before, first[j], second[j]}, Found{lines, other[j], other[t.width + j]});
            first[j] = f.first, second[j] = f.second;
        }
    }
}

INLINE void set_columns(const call &c, const table &t, int64_t k, channel p) {
    for (int64_t j = k; j < t.width; j += c.channels)
        for (int which = 0; which < PARAMETERS; which++) t.parameters.of[which * t.parameters.padded + j] = p.of[which];
}
template <class Found> static void rows_work(const task &c, const table &t, int64_t thread, int64_t threads) {
    // A thread visits its parts twice, the second time from the last, which its cache still holds: not OpenMP's loop.
    const int64_t begin = t.parts * thread / threads, end = t.parts * (thread + 1) / threads;
    const double lines = (double)t.lines, *const first = t.sums, *const second = first + t.width;
    if (c.dy) {
#pragma omp for schedule(static, COLUMNS)
        for (int64_t k = 0; k < c.channels; k++) set_columns(c, t, k, normalization(c, k));
    }
    for (int64_t part = begin; part < end; part++)
        sum_part(c, t, part, t.scratch + 3 * t.parameters.padded * thread, Found());
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t j = 0; j < t.width; j += COLUMNS)
        if (!c.frozen || c.dy) join_parts<Found>(t, j, smaller(t.width, j + COLUMNS));
#pragma omp for schedule(static, COLUMNS)
    for (int64_t k = 0; k < c.channels; k++) {
        Found found = {lines, first[k], second[k]};
        for (int64_t j = k + c.channels; j < t.width; j += c.channels)
            found = joined(found, Found{lines, first[j], second[j]});
        set_columns(c, t, k, settled(c, k, found));
    }
    with_activation(c, [&](auto activation) {
        for (int64_t part = end - 1; part >= begin; part--)
            for (int64_t number = lines_before(t, part); number < lines_before(t, part + 1); number++)
                write<activation.value>(c, line_of(c, t, number), t.parameters, Found());
    });
}

// ---- entry ---------------------------------------------------------------------------------------------------------
// A large tensor that has just been allocated is not mapped yet: by 4 KiB pages that would cost as much as the rest.
static void use_huge_pages([[maybe_unused]] void *memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, from = pieces((uintptr_t)memory, page) * page;
    if (memory && bytes >= HUGE_FROM) madvise((void *)from, (bytes - page) / page * page, MADV_HUGEPAGE);
#endif
}
// Whether the results are written past the caches: they are large, and lines are whole cache lines.
static bool writes_past_caches(const call &c, int64_t line_values, int64_t bytes) {
    const uintptr_t unaligned = ((uintptr_t)c.y | (uintptr_t)c.dx | (uintptr_t)c.dresidual) % CACHE_LINE;
    return !unaligned && bytes >= PAST_CACHES_FROM && line_values * sizeof(element) % CACHE_LINE == 0;
}

template <class Work> static void on_threads(const call &c, Work work) { // work(thread, threads)
    const auto fenced = [&](int64_t thread, int64_t threads) {
        work(thread, threads);
#ifdef __AVX__
        _mm_sfence(); // other stores may otherwise be seen before those past the caches
#endif
    };
    if (c.threads == 1) return fenced(0, 1); // a team of one thread takes a microsecond
#pragma omp parallel num_threads((int)c.threads)
    fenced(omp_get_thread_num(), omp_get_num_threads());
}
template <class Found> static int run(const call &asked) { // 0, or 1 for lack of memory
    task c = {asked, false};
    const int64_t values = values_of_channel(c) * c.channels, bytes = values * (int64_t)sizeof(element);
    if (values < ALONE_BELOW) c.threads = 1;
    use_huge_pages(c.y, bytes), use_huge_pages(c.dx, bytes), use_huge_pages(c.dresidual, bytes);
    void *memory;
    if (c.rows) {
        table t = tabled(c);
        c.past_caches = writes_past_caches(c, t.width, bytes);
        const int64_t sums = t.parts * 2 * t.width, wides = (PARAMETERS + 3 * c.threads) * t.parameters.padded;
        if (!(memory = malloc(sums * sizeof(double) + wides * sizeof(wide)))) return 1;
        t.sums = (double *)memory;
        t.parameters.of = (wide *)(t.sums + sums), t.scratch = t.parameters.of + PARAMETERS * t.parameters.padded;
        on_threads(c, [&](int64_t thread, int64_t threads) { rows_work<Found>(c, t, thread, threads); });
    } else {
        const planes g = cut(c);
        c.past_caches = writes_past_caches(c, c.positions, bytes);
        const int64_t partials = c.channels * g.parts;
        if (!(memory = calloc(1, sizeof(Found) * partials + sizeof(channel) * c.channels))) return 1;
        Found *const partial = (Found *)memory;
        on_threads(c, [&](int64_t, int64_t) { planes_work(c, g, partial, (channel *)(partial + partials)); });
    }
    free(memory);
    return 0;
}
} // namespace

// How a call is divided: 0 whole channels, 1 channels in parts, 2 rows in parts.
extern "C" int division(const call *c) { return c->rows ? 2 : whole_channels(*c) ? 0 : 1; }
extern "C" int forward(const call *c) { return run<moments>(*c); }
extern "C" int backward(const call *c) { return run<gradients>(*c); }
