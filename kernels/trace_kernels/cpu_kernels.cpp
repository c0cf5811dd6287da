// The C++ path of the ops on CPU tensors; cpu.py builds and calls it. Plain C interface, no torch headers.
//
// Every op walks the support in tiles of TILE compact entries. A tile is widened to fp32 in L1 unless it is fp32
// already, computed there by loops over contiguous floats, which the compiler vectorises, rounded in L1, and moved
// to or from the local slice stretch by stretch. Meanwhile the slice's entries further on are fetched: the hardware
// stops at the edge of each page and does not follow the mask. Built with -ffp-contract=off: a multiply and an
// add fuse where std::fma says so and nowhere else.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t TILE = 256;   // entries: small enough that memory never idles while a tile is computed,
constexpr int64_t SMALL = 128;  // and of short units, whose lines come late, where half of it is faster
constexpr int64_t AHEAD = 512;  // entries between the fetch of a cache line and its use
constexpr int64_t SWAP_AHEAD = 4096;  // the same of a swap, which does nothing but wait for memory
constexpr int64_t LONG = 64;    // entries from which a unit is computed or rounded where it lies
constexpr int64_t CACHE_LINE = 64;

typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
constexpr int64_t LANES = 8;  // of either
constexpr int64_t SUMS = 4;   // independent ones, to hide the latency of an addition

enum Dtype : int64_t { FP32 = 0, BF16 = 1 };

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// rounding.py: truncate_bf16, round_bf16, random_word
uint16_t truncate_bf16(uint32_t bits, uint32_t noise) {
    const uint32_t quiet = bits >> 16 | ((bits & 0x7FFFFF) != 0 ? 0x40 : 0);
    return (bits & 0x7F800000) != 0x7F800000 ? (bits + noise) >> 16 : quiet;
}

uint32_t mix(uint32_t word) {
    word = (word ^ word >> 16) * 0x7FEB352Du;
    word = (word ^ word >> 15) * 0x846CA68Bu;
    return word ^ word >> 16;
}

// Asks for the cache lines of [address, address + num_bytes): LEVEL 3 into L1; 2 into L2, for single elements, whose
// lines would crowd out the rest.
template <int LEVEL>
void fetch(const void* address, int64_t num_bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    for (uintptr_t line = begin & -CACHE_LINE; line < begin + num_bytes; line += CACHE_LINE) {
        __builtin_prefetch(reinterpret_cast<const void*>(line), 0, LEVEL);
    }
}

const float* widen(const void* source, int64_t dtype, int64_t begin, int64_t n, float* buffer) {
    if (dtype == FP32) return static_cast<const float*>(source) + begin;
    const uint16_t* half = static_cast<const uint16_t*>(source) + begin;
    for (int64_t i = 0; i < n; ++i) buffer[i] = from_bits(static_cast<uint32_t>(half[i]) << 16);
    return buffer;
}

void round_nearest(const float* x, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = to_bits(x[i]);
        out[i] = truncate_bf16(bits, 0x7FFF + (bits >> 16 & 1));
    }
}

}  // namespace

extern "C" {

// Mirrors of the ctypes structures in cpu.py: 8-byte fields only, so that no padding can differ.
struct Runs {
    const void* units;
    int64_t unit_bytes, num_entries, block, base, skip;
};

struct Step {
    void *weight, *master, *exp_avg, *exp_avg_sq;  // master null: the weight is its own master copy
    const void* grad;
    const int32_t* ages;  // null: all entries share one step
    const float *step_sizes, *corrections2_sqrt;  // by age; null without ages
    int64_t weight_dtype, grad_dtype, exp_avg_dtype, exp_avg_sq_dtype;
    int64_t last_age, stochastic, key_1, key_2;  // whether the weight is rounded so; a bf16 exp_avg_sq always is
    double step_size, correction2_sqrt;  // without ages
    double grad_scale, decay, weight1, beta2, weight2, eps;
    double* squares;  // the gradient's sum of squares is added here, unless null
};

struct Swap {
    Runs runs;
    void *weight, *values;
    int64_t bytes;  // of an element
};
}

namespace {

// Where a compact position lies: in which unit, and how far into it.
struct Place {
    int64_t index, lane;

    Place() : index(0), lane(0) {}

    Place(const Runs& runs, int64_t position)
        : index((position + runs.skip) / runs.block), lane((position + runs.skip) % runs.block) {}

    template <class Unit>
    int64_t local(const Runs& runs, const Unit* units) const {
        return static_cast<int64_t>(units[index]) * runs.block + lane - runs.base;
    }

    // By at most what is left of the unit.
    void advance(const Runs& runs, int64_t n) {
        lane += n;
        if (lane == runs.block) lane = 0, ++index;
    }
};

// Calls move(local, compact, n) for each stretch of the slice that holds compact positions [begin, end), and
// fetches the cache lines of the entries AHEAD of it.
template <class Unit, class Word, class Move>
void walk_units(const Runs& runs, int64_t begin, int64_t end, const Word* slice, Move move) {
    const Unit* units = static_cast<const Unit*>(runs.units);
    if (runs.block == 1) {
        const int64_t fetching = std::clamp(runs.num_entries - AHEAD, begin, end);
        for (int64_t p = begin; p < fetching; ++p) {
            fetch<2>(slice + (static_cast<int64_t>(units[p + AHEAD]) - runs.base), sizeof(Word));
            move(static_cast<int64_t>(units[p]) - runs.base, p, 1);
        }
        for (int64_t p = fetching; p < end; ++p) move(static_cast<int64_t>(units[p]) - runs.base, p, 1);
        return;
    }
    Place here(runs, begin), ahead(runs, begin + AHEAD);
    for (int64_t p = begin; p < end;) {
        const int64_t n = std::min(runs.block - here.lane, end - p);
        for (int64_t left = std::min(n, runs.num_entries - (p + AHEAD)); left > 0;) {
            const int64_t k = std::min(runs.block - ahead.lane, left);
            fetch<3>(slice + ahead.local(runs, units), k * sizeof(Word));
            ahead.advance(runs, k);
            left -= k;
        }
        move(here.local(runs, units), p, n);
        here.advance(runs, n);
        p += n;
    }
}

template <class Word, class Move>
void walk(const Runs& runs, int64_t begin, int64_t end, const Word* slice, Move move) {
    if (runs.unit_bytes == 4) {
        walk_units<int32_t>(runs, begin, end, slice, move);
    } else {
        walk_units<int64_t>(runs, begin, end, slice, move);
    }
}

template <class Word>
void take(const Runs& runs, int64_t begin, int64_t end, const void* slice, Word* out) {
    const Word* words = static_cast<const Word*>(slice);
    walk(runs, begin, end, words, [=](int64_t local, int64_t p, int64_t n) {
        std::memcpy(out + (p - begin), words + local, n * sizeof(Word));
    });
}

template <class Word>
void put(const Runs& runs, int64_t begin, int64_t end, void* slice, const Word* values) {
    Word* words = static_cast<Word*>(slice);
    walk(runs, begin, end, words, [=](int64_t local, int64_t p, int64_t n) {
        std::memcpy(words + local, values + (p - begin), n * sizeof(Word));
    });
}

// Entries [begin, end) of the slice in fp32.
void take_floats(const Runs& runs, int64_t begin, int64_t end, const void* slice, int64_t dtype, float* out) {
    if (dtype == FP32) return take(runs, begin, end, slice, out);
    uint16_t half[TILE];
    take(runs, begin, end, slice, half);
    widen(half, BF16, 0, end - begin, out);
}

// Rounds fp32 values to the dtype of the slice and writes them to its entries [begin, end).
void put_floats(const Runs& runs, int64_t begin, int64_t end, void* slice, int64_t dtype, const float* values) {
    if (dtype == FP32) return put(runs, begin, end, slice, values);
    uint16_t half[TILE];
    round_nearest(values, end - begin, half);
    put(runs, begin, end, slice, half);
}

// The hash of each entry [begin, end): noise for its weight in the lower half, for its second moment in the upper one.
void random_words(const Runs& runs, int64_t begin, int64_t end, const Step& step, uint32_t* words) {
    uint64_t global[TILE];
    const auto keep = [&](int64_t local, int64_t p, int64_t n) {
        for (int64_t i = 0; i < n; ++i) global[p - begin + i] = local + i + runs.base;
    };
    if (step.weight_dtype == FP32) {
        walk(runs, begin, end, static_cast<const float*>(step.weight), keep);
    } else {
        walk(runs, begin, end, static_cast<const uint16_t*>(step.weight), keep);
    }
    const uint32_t key_1 = step.key_1, key_2 = step.key_2;
    for (int64_t i = 0; i < end - begin; ++i) {
        const uint32_t low = global[i], high = global[i] >> 32;
        words[i] = mix(mix(low ^ key_1) ^ high ^ key_2);
    }
}

void round_stochastic(const float* x, int64_t n, const uint32_t* words, int shift, uint16_t* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = truncate_bf16(to_bits(x[i]), words[i] >> shift & 0xFFFF);
}

// Runs body(tile, begin, end) over the tiles of num_entries. What a tile computes depends on its place alone, so
// results have the same bits on any number of threads.
template <int64_t SIZE = TILE, class Body>
void for_tiles(int64_t num_entries, int64_t num_threads, Body body) {
    const int64_t num_tiles = (num_entries + SIZE - 1) / SIZE;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
        body(tile, tile * SIZE, std::min(num_entries, (tile + 1) * SIZE));
    }
}

double sum_of_squares(const float* x, int64_t n) {
    Doubles sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES) {
        for (int64_t k = 0; k < SUMS; ++k) {
            Floats values;
            std::memcpy(&values, x + i + k * LANES, sizeof values);
            const Doubles wide = __builtin_convertvector(values, Doubles);
            sums[k] += wide * wide;
        }
    }
    const Doubles lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    for (; i < n; ++i) total += static_cast<double>(x[i]) * x[i];
    return total;
}

// One partial sum per tile, or per SMALL one.
std::vector<double> partials(int64_t num_entries) { return std::vector<double>((num_entries + SMALL - 1) / SMALL); }

double total(const std::vector<double>& sums) { return std::accumulate(sums.begin(), sums.end(), 0.0); }

// The formula of masked_adamw.py on contiguous fp32; correction(i) gives entry i's two bias corrections.
template <class Correction>
void update(const Step& step, int64_t n, float* __restrict p, const float* __restrict g, float* __restrict m,
            float* __restrict v, Correction correction) {
    const float grad_scale = step.grad_scale, decay = step.decay, beta2 = step.beta2, weight2 = step.weight2;
    const float weight1 = step.weight1, eps = step.eps;
    const bool far = weight1 >= 0.5f;  // torch's lerp starts from the nearer end
    const float slope = far ? weight1 - 1 : weight1;
    for (int64_t i = 0; i < n; ++i) {
        const float gradient = g[i] * grad_scale;
        m[i] = std::fma(slope, gradient - m[i], far ? gradient : m[i]);
        v[i] = std::fma(weight2 * gradient, gradient, v[i] * beta2);
        const auto [step_size, correction2_sqrt] = correction(i);
        const float denom = std::sqrt(v[i]) / correction2_sqrt + eps;
        p[i] = p[i] * decay - step_size * m[i] / denom;
    }
}

struct Corrections {
    float step_size, correction2_sqrt;
};

void step_tile(const Runs& runs, const Step& step, int64_t begin, int64_t end, double* squares) {
    float p_tile[TILE], g_tile[TILE], m_tile[TILE], v_tile[TILE];
    const int64_t n = end - begin;
    const float* g = widen(step.grad, step.grad_dtype, begin, n, g_tile);
    if (squares) *squares = sum_of_squares(g, n);
    float* m = const_cast<float*>(widen(step.exp_avg, step.exp_avg_dtype, begin, n, m_tile));
    float* v = const_cast<float*>(widen(step.exp_avg_sq, step.exp_avg_sq_dtype, begin, n, v_tile));
    const auto update_stretch = [&](float* p, int64_t first, int64_t length) {
        if (step.ages) {
            const int32_t *ages = step.ages + begin + first, last = step.last_age;
            const float *step_sizes = step.step_sizes, *corrections2_sqrt = step.corrections2_sqrt;
            update(step, length, p, g + first, m + first, v + first, [=](int64_t i) {
                const int32_t age = std::max(0, std::min(ages[i], last));
                return Corrections{step_sizes[age], corrections2_sqrt[age]};
            });
        } else {
            const Corrections shared{static_cast<float>(step.step_size), static_cast<float>(step.correction2_sqrt)};
            update(step, length, p, g + first, m + first, v + first, [=](int64_t) { return shared; });
        }
    };
    const bool in_place = !step.master && step.weight_dtype == FP32 && runs.block >= LONG;
    float* p = step.master ? static_cast<float*>(step.master) + begin : p_tile;
    if (in_place) {
        float* weight = static_cast<float*>(step.weight);
        walk(runs, begin, end, weight, [&](int64_t local, int64_t position, int64_t length) {
            update_stretch(weight + local, position - begin, length);
        });
    } else {
        if (!step.master) take_floats(runs, begin, end, step.weight, step.weight_dtype, p);
        update_stretch(p, 0, n);
    }
    if (step.exp_avg_dtype == BF16) round_nearest(m, n, static_cast<uint16_t*>(step.exp_avg) + begin);
    uint32_t words[TILE];
    if (step.stochastic || step.exp_avg_sq_dtype == BF16) random_words(runs, begin, end, step, words);
    if (step.exp_avg_sq_dtype == BF16) {
        round_stochastic(v, n, words, 16, static_cast<uint16_t*>(step.exp_avg_sq) + begin);
    }
    if (in_place) return;
    if (step.stochastic) {
        uint16_t half[TILE];
        round_stochastic(p, n, words, 0, half);
        put(runs, begin, end, step.weight, half);
    } else if (step.weight_dtype == BF16 && runs.block >= LONG) {
        uint16_t* weight = static_cast<uint16_t*>(step.weight);
        walk(runs, begin, end, weight, [=](int64_t local, int64_t position, int64_t length) {
            round_nearest(p + (position - begin), length, weight + local);
        });
    } else {
        put_floats(runs, begin, end, step.weight, step.weight_dtype, p);
    }
}

template <class Word>
void swap_words(const Swap& swap, int64_t begin, int64_t end) {
    Word *words = static_cast<Word*>(swap.weight), *compact = static_cast<Word*>(swap.values);
    walk(swap.runs, begin, end, words, [=](int64_t local, int64_t p, int64_t n) {
        std::swap_ranges(words + local, words + local + n, compact + p);
    });
}

// Apart, where single elements are walked as fast as in the other ops.
__attribute__((noinline)) void swap_short(const Swap& swap, int64_t begin, int64_t end) {
    if (swap.bytes == 2) swap_words<uint16_t>(swap, begin, end);
    if (swap.bytes == 4) swap_words<uint32_t>(swap, begin, end);
    if (swap.bytes == 8) swap_words<uint64_t>(swap, begin, end);
}

__attribute__((noinline)) void write_short(const Swap& swap, int64_t begin, int64_t end) {
    const auto values = [&](auto word) { return static_cast<const decltype(word)*>(swap.values) + begin; };
    if (swap.bytes == 2) put(swap.runs, begin, end, swap.weight, values(uint16_t()));
    if (swap.bytes == 4) put(swap.runs, begin, end, swap.weight, values(uint32_t()));
    if (swap.bytes == 8) put(swap.runs, begin, end, swap.weight, values(uint64_t()));
}

void exchange_bytes(char* __restrict one, char* __restrict other, int64_t n) {
    int64_t i = 0;
    for (; i + CACHE_LINE <= n; i += CACHE_LINE) {
        char line[CACHE_LINE];
        std::memcpy(line, one + i, CACHE_LINE);
        std::memcpy(one + i, other + i, CACHE_LINE);
        std::memcpy(other + i, line, CACHE_LINE);
    }
    std::swap_ranges(one + i, one + n, other + i);
}

// Past the caches: lines that are written whole need not be read first.
void write_bytes(char* __restrict to, const char* __restrict from, int64_t n) {
#ifdef __SSE2__
    const int64_t head = std::min<int64_t>(n, -reinterpret_cast<uintptr_t>(to) & (CACHE_LINE - 1));
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + CACHE_LINE <= n; i += CACHE_LINE) {
        __m128i line[CACHE_LINE / sizeof(__m128i)];
        std::memcpy(line, from + i, CACHE_LINE);
        for (size_t k = 0; k < CACHE_LINE / sizeof(__m128i); ++k) {
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + i) + k, line[k]);
        }
    }
    std::memcpy(to + i, from + i, n - i);
#else
    std::memcpy(to, from, n);
#endif
}

// What was written past the caches is there for other threads before what they are told next.
void end_writes() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// A position among the entries of all swaps, one after the other.
class Position {
public:
    Position(const Swap* swaps, int64_t num_swaps, int64_t entry) : swap_(swaps), end_(swaps + num_swaps), here_{} {
        skip();
        for (; swap_ != end_ && entry >= swap_->runs.num_entries; skip()) entry -= swap_->runs.num_entries, ++swap_;
        if (swap_ != end_) here_ = Place(swap_->runs, entry), entry_ = entry;
    }

    // Entries from here on that lie side by side; of short units, all that are left of the swap.
    int64_t length() const {
        if (swap_ == end_) return 0;
        const int64_t left = swap_->runs.num_entries - entry_;
        return is_short() ? left : std::min(left, swap_->runs.block - here_.lane);
    }

    // Inlined: gcc takes a function that does nothing but fetch for one that does nothing.
    __attribute__((always_inline)) void fetch_weight(int64_t n) const {
        if (!is_short()) fetch<2>(weight(), n * swap_->bytes);
    }

    __attribute__((always_inline)) void fetch_values(int64_t n) const {
        if (!is_short()) fetch<2>(values(), n * swap_->bytes);
    }

    void exchange(int64_t n) const {
        if (is_short()) return swap_short(*swap_, entry_, entry_ + n);
        exchange_bytes(weight(), values(), n * swap_->bytes);
    }

    void write(int64_t n) const {
        if (is_short()) return write_short(*swap_, entry_, entry_ + n);
        write_bytes(weight(), values(), n * swap_->bytes);
    }

    void advance(int64_t n) {
        entry_ += n;
        if (entry_ == swap_->runs.num_entries) {
            ++swap_;
            skip();
            entry_ = 0;
            if (swap_ != end_) here_ = Place(swap_->runs, 0);
        } else if (is_short()) {
            here_ = Place(swap_->runs, entry_);
        } else {
            here_.advance(swap_->runs, n);
        }
    }

private:
    bool is_short() const { return swap_->runs.block < LONG; }

    void skip() {
        while (swap_ != end_ && swap_->runs.num_entries == 0) ++swap_;
    }

    char* values() const { return static_cast<char*>(swap_->values) + entry_ * swap_->bytes; }

    char* weight() const {
        const Runs& runs = swap_->runs;
        const int64_t local = runs.unit_bytes == 4 ? here_.local(runs, static_cast<const int32_t*>(runs.units))
                                                   : here_.local(runs, static_cast<const int64_t*>(runs.units));
        return static_cast<char*>(swap_->weight) + local * swap_->bytes;
    }

    const Swap *swap_, *end_;
    Place here_;
    int64_t entry_ = 0;
};

// Calls move(here, n) for each stretch. The entries of all parameters are dealt out together, so that threads start once. While
// one unit is moved, fetch(ahead, n) asks for the cache lines of a later one, of the next parameter too.
template <class Fetch, class Move>
void for_stretches(const Swap* swaps, int64_t num_swaps, int64_t num_threads, Fetch fetch, Move move) {
    int64_t num_entries = 0;
    for (int64_t i = 0; i < num_swaps; ++i) num_entries += swaps[i].runs.num_entries;
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (int64_t thread = 0; thread < num_threads; ++thread) {
        const int64_t begin = num_entries * thread / num_threads, end = num_entries * (thread + 1) / num_threads;
        const int64_t lead = std::min(SWAP_AHEAD, end - begin);
        Position here(swaps, num_swaps, begin), ahead(swaps, num_swaps, begin + lead);
        int64_t fetched = begin + lead;
        for (int64_t done = begin; done < end;) {
            const int64_t n = std::min(here.length(), end - done);
            while (fetched < std::min(end, done + n + lead)) {
                const int64_t k = std::min(ahead.length(), std::min(end, done + n + lead) - fetched);
                fetch(ahead, k);
                ahead.advance(k);
                fetched += k;
            }
            move(here, n);
            here.advance(n);
            done += n;
        }
        end_writes();
    }
}

}  // namespace

extern "C" {

void masked_adamw(const Runs* runs, const Step* step, int64_t num_threads) {
    std::vector<double> sums = partials(step->squares ? runs->num_entries : 0);
    const auto body = [&](int64_t tile, int64_t begin, int64_t end) {
        step_tile(*runs, *step, begin, end, step->squares ? &sums[tile] : nullptr);
    };
    if (runs->block < TILE) {
        for_tiles<SMALL>(runs->num_entries, num_threads, body);
    } else {
        for_tiles(runs->num_entries, num_threads, body);
    }
    if (step->squares) *step->squares += total(sums);
}

void compact_gather(const Runs* runs, const void* src, int64_t src_dtype, float* out, double scale,
                    int64_t accumulate, double* sumsq, int64_t num_threads) {
    std::vector<double> sums = partials(sumsq ? runs->num_entries : 0);
    const float factor = scale;
    for_tiles(runs->num_entries, num_threads, [&](int64_t tile, int64_t begin, int64_t end) {
        float values[TILE];
        float* target = out + begin;
        fetch<3>(target + AHEAD, TILE * sizeof(float));
        take_floats(*runs, begin, end, src, src_dtype, values);
        for (int64_t i = 0; i < end - begin; ++i) {
            const float value = values[i] * factor;
            target[i] = accumulate ? target[i] + value : value;
        }
        if (sumsq) sums[tile] = sum_of_squares(target, end - begin);
    });
    if (sumsq) *sumsq = total(sums);
}

void compact_scatter(const Runs* runs, void* dst, int64_t dst_dtype, const void* values, int64_t values_dtype,
                     int64_t num_threads) {
    for_tiles(runs->num_entries, num_threads, [=](int64_t, int64_t begin, int64_t end) {
        float buffer[TILE];
        put_floats(*runs, begin, end, dst, dst_dtype, widen(values, values_dtype, begin, end - begin, buffer));
    });
}

double compact_sumsq(const void* values, int64_t dtype, int64_t num_entries, int64_t num_threads) {
    std::vector<double> sums = partials(num_entries);
    for_tiles(num_entries, num_threads, [&](int64_t tile, int64_t begin, int64_t end) {
        float buffer[TILE];
        const int64_t item_bytes = dtype == FP32 ? 4 : 2;
        fetch<3>(static_cast<const char*>(values) + (begin + AHEAD) * item_bytes, TILE * item_bytes);
        sums[tile] = sum_of_squares(widen(values, dtype, begin, end - begin, buffer), end - begin);
    });
    return total(sums);
}

// Exchanges the entries of the weights with the values.
void delta_swap(const Swap* swaps, int64_t num_swaps, int64_t num_threads) {
    for_stretches(
        swaps, num_swaps, num_threads, [](const Position& ahead, int64_t n) { ahead.fetch_weight(n); },
        [](const Position& here, int64_t n) { here.exchange(n); });
}

// Writes the values to the entries of the weights.
void delta_write(const Swap* swaps, int64_t num_swaps, int64_t num_threads) {
    for_stretches(
        swaps, num_swaps, num_threads, [](const Position& ahead, int64_t n) { ahead.fetch_values(n); },
        [](const Position& here, int64_t n) { here.write(n); });
}
}
