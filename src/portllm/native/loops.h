/* The loops of kernels.c, compiled once for each instruction set: it defines NAME, TARGET, LANES and TILE before each
   time. A vector has LANES elements; the last one of a row may have fewer, with zeros behind them. */

typedef float NAME(floats) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES)));

#define floats NAME(floats)
#define words NAME(words)
#define halves NAME(halves)

/* Load or store a vector, whose last `lacks` elements are not there. */
#define LOAD(vector, from, lacks)                                                                                      \
    do {                                                                                                               \
        typedef __typeof__(vector) anywhere __attribute__((aligned(1), may_alias));                                    \
        if (lacks) {                                                                                                   \
            memset(&(vector), 0, sizeof(vector));                                                                      \
            memcpy(&(vector), from, sizeof(vector) / LANES * (size_t)(LANES - (lacks)));                               \
        } else                                                                                                         \
            (vector) = *(const anywhere *)(from);                                                                      \
    } while (0)
#define STORE(vector, to, lacks) memcpy(to, &(vector), sizeof(vector) / LANES * (size_t)(LANES - (lacks)))

/* ROWS rows of `count` vectors of a product with a scale: scale · (b0·a0 + b1·a1 + ...), each term added by one fused
   multiply-add where the processor has it, in order. What is multiplied with `a` lies `step` elements apart. */
static inline __attribute__((always_inline)) TARGET void
NAME(tile)(const float *const b[ROWS], long step, const float *a, long stride, long terms, float scale, int count,
           int lacks, float *out)
{
    floats sum[ROWS][TILE] = {{{0}}};
    for (long k = 0; k < terms; k++)
        for (int t = 0; t < count; t++) {
            floats right;
            LOAD(right, a + k * stride + t * LANES, lacks);
            for (int i = 0; i < ROWS; i++)
                sum[i][t] += b[i][k * step] * right;
        }
    for (int i = 0; i < ROWS; i++)
        for (int t = 0; t < count; t++) {
            floats scaled = sum[i][t] * scale;
            memcpy(out + i * CHUNK + t * LANES, &scaled, sizeof scaled);
        }
}

static inline __attribute__((always_inline)) TARGET void
NAME(tiles)(const float *const b[ROWS], long step, const float *a, long stride, long terms, float scale, long width,
            float *out)
{
    long j = 0;
    for (; j + TILE * LANES <= width; j += TILE * LANES)
        NAME(tile)(b, step, a + j, stride, terms, scale, TILE, 0, out + j);
    for (; j + LANES <= width; j += LANES)
        NAME(tile)(b, step, a + j, stride, terms, scale, 1, 0, out + j);
    if (j < width)
        NAME(tile)(b, step, a + j, stride, terms, scale, 1, (int)(j + LANES - width), out + j);
}

/* Not inlined, so that the sum of weight and delta is not fused with the product by `scale`. */
static __attribute__((noinline)) TARGET void NAME(delta)(const float *const b[ROWS], const float *a, long stride,
                                                         long rank, float scale, long width, float *out)
{
    NAME(tiles)(b, 1, a, stride, rank, scale, width, out);
}

static inline TARGET void NAME(measure)(floats weight, floats delta, floats merged, floats sums[4])
{
    floats change = merged - weight, lost = change - delta;
    sums[0] += delta * delta;
    sums[1] += change * delta;
    sums[2] += lost * lost;
    sums[3] += weight * weight;
}

static inline TARGET floats NAME(widen)(halves bits)
{
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

/* To nearest, ties to even. What is no number shows in the sums. */
static inline TARGET halves NAME(round)(floats exact)
{
    words bits = (words)exact;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
}

static inline __attribute__((always_inline)) TARGET void
NAME(add_bfloat16)(const uint16_t *stored, const float *delta, uint16_t *out, int lacks, floats sums[4])
{
    halves bits;
    floats change;
    LOAD(bits, stored, lacks);
    LOAD(change, delta, lacks);
    floats weight = NAME(widen)(bits);
    halves merged = NAME(round)(weight + change);
    NAME(measure)(weight, change, NAME(widen)(merged), sums);
    STORE(merged, out, lacks);
}

static inline __attribute__((always_inline)) TARGET void
NAME(add_float32)(const float *stored, const float *delta, float *out, int lacks, floats sums[4])
{
    floats weight, change;
    LOAD(weight, stored, lacks);
    LOAD(change, delta, lacks);
    floats merged = weight + change;
    NAME(measure)(weight, change, merged, sums);
    STORE(merged, out, lacks);
}

static TARGET void NAME(merge)(const struct merge *job, double total[4])
{
    float delta[ROWS * CHUNK];
    for (long first = 0; first < job->width; first += CHUNK) {
        long width = job->width - first < CHUNK ? job->width - first : CHUNK;
        for (long i = 0; i < job->rows; i += ROWS) {
            long rows = job->rows - i < ROWS ? job->rows - i : ROWS;
            const float *b[ROWS]; /* of rows that are not there, the last one's: what it gives is not read */
            for (long r = 0; r < ROWS; r++)
                b[r] = job->b + (i + (r < rows ? r : rows - 1)) * job->rank;
            NAME(delta)(b, job->a + first, job->width, job->rank, job->scale, width, delta);
            floats sums[4] = {{0}};
            for (long r = 0; r < rows; r++) {
                const float *change = delta + r * CHUNK;
                long place = (i + r) * job->width + first, whole = width / LANES * LANES, j;
                int lacks = (int)(whole + LANES - width);
                if (job->is_float32) {
                    const float *stored = (const float *)job->stored + place;
                    float *out = (float *)job->out + place;
                    for (j = 0; j < whole; j += LANES)
                        NAME(add_float32)(stored + j, change + j, out + j, 0, sums);
                    if (lacks < LANES)
                        NAME(add_float32)(stored + j, change + j, out + j, lacks, sums);
                } else {
                    const uint16_t *stored = (const uint16_t *)job->stored + place;
                    uint16_t *out = (uint16_t *)job->out + place;
                    for (j = 0; j < whole; j += LANES)
                        NAME(add_bfloat16)(stored + j, change + j, out + j, 0, sums);
                    if (lacks < LANES)
                        NAME(add_bfloat16)(stored + j, change + j, out + j, lacks, sums);
                }
            }
            for (int s = 0; s < 4; s++)
                for (int lane = 0; lane < LANES; lane++)
                    total[s] += sums[s][lane];
        }
    }
}

static inline __attribute__((always_inline)) TARGET void
NAME(drift_step)(const uint16_t *base, const uint16_t *evolved, int lacks, floats sums[3])
{
    halves old, new;
    LOAD(old, base, lacks);
    LOAD(new, evolved, lacks);
    floats weight = NAME(widen)(old), moved = NAME(widen)(new) - weight;
    sums[0] += weight * weight;
    sums[1] += moved * moved;
    sums[2] += weight * moved;
}

/* |W0|², |D|² and <W0, D> with D = W1 - W0, of weights in bfloat16. */
static TARGET void NAME(drift)(const uint16_t *base, const uint16_t *evolved, long count, double total[3])
{
    for (long start = 0; start < count; start += RUN) {
        long stop = count - start < RUN ? count : start + RUN, whole = start + (stop - start) / LANES * LANES, j;
        floats sums[3] = {{0}};
        for (j = start; j < whole; j += LANES)
            NAME(drift_step)(base + j, evolved + j, 0, sums);
        if (j < stop)
            NAME(drift_step)(base + j, evolved + j, (int)(j + LANES - stop), sums);
        for (int s = 0; s < 3; s++)
            for (int lane = 0; lane < LANES; lane++)
                total[s] += sums[s][lane];
    }
}

static inline __attribute__((always_inline)) TARGET void
NAME(dots_step)(const float *const x[ROWS], const float *const y[ACROSS], long j, int lacks,
                floats sums[ROWS][ACROSS])
{
    floats left[ROWS], right;
    for (int i = 0; i < ROWS; i++)
        LOAD(left[i], x[i] + j, lacks);
    for (int k = 0; k < ACROSS; k++) {
        LOAD(right, y[k] + j, lacks);
        for (int i = 0; i < ROWS; i++)
            sums[i][k] += left[i] * right;
    }
}

/* The products of ROWS rows with ACROSS rows, whose elements lie side by side. */
static TARGET void NAME(dots)(const float *const x[ROWS], const float *const y[ACROSS], long width,
                              double total[ROWS][ACROSS])
{
    for (long start = 0; start < width; start += RUN) {
        long stop = width - start < RUN ? width : start + RUN, whole = start + (stop - start) / LANES * LANES, j;
        floats sums[ROWS][ACROSS] = {{{0}}};
        for (j = start; j < whole; j += LANES)
            NAME(dots_step)(x, y, j, 0, sums);
        if (j < stop)
            NAME(dots_step)(x, y, j, (int)(j + LANES - stop), sums);
        for (int i = 0; i < ROWS; i++)
            for (int k = 0; k < ACROSS; k++)
                for (int lane = 0; lane < LANES; lane++)
                    total[i][k] += sums[i][k][lane];
    }
}

/* X · Yᵀ where the elements of a row lie side by side in both; of X · Xᵀ, one half is made and taken for both. */
static TARGET void NAME(products_of_rows)(const struct products *job)
{
    int is_gram = job->one == job->other && job->one_stride == job->other_stride && job->rows == job->columns;
    for (long i = 0; i < job->rows; i += ROWS)
        for (long k = is_gram ? i : 0; k < job->columns; k += ACROSS) {
            const float *x[ROWS], *y[ACROSS]; /* of rows that are not there, the last one's: it is not read */
            for (long r = 0; r < ROWS; r++)
                x[r] = job->one + (i + r < job->rows ? i + r : job->rows - 1) * job->one_stride;
            for (long s = 0; s < ACROSS; s++)
                y[s] = job->other + (k + s < job->columns ? k + s : job->columns - 1) * job->other_stride;
            double total[ROWS][ACROSS] = {{0}};
            NAME(dots)(x, y, job->width, total);
            for (long r = 0; r < ROWS && i + r < job->rows; r++)
                for (long s = 0; s < ACROSS && k + s < job->columns; s++) {
                    job->out[(i + r) * job->columns + k + s] = total[r][s];
                    if (is_gram)
                        job->out[(k + s) * job->columns + i + r] = total[r][s];
                }
        }
}

/* X · Yᵀ where the elements of a column of Y lie side by side. */
static TARGET void NAME(products_of_columns)(const struct products *job)
{
    float part[ROWS * CHUNK];
    for (long first = 0; first < job->columns; first += CHUNK) {
        long columns = job->columns - first < CHUNK ? job->columns - first : CHUNK;
        long padded = (columns + LANES - 1) / LANES * LANES, beyond = first + padded - job->columns;
        /* A whole vector is read faster than a part of one, and as good, where what lies behind is of the same matrix. */
        long safe = beyond > 0 ? job->width - (beyond - 1) / job->other_step - 1 : job->width;
        for (long start = 0, stop; start < job->width; start = stop) {
            long limit = start < safe ? safe : job->width;
            stop = limit - start < TERMS ? limit : start + TERMS;
            for (long i = 0; i < job->rows; i += ROWS) {
                const float *x[ROWS], *y = job->other + start * job->other_step + first;
                for (long r = 0; r < ROWS; r++)
                    x[r] = job->one + (i + r < job->rows ? i + r : job->rows - 1) * job->one_stride +
                           start * job->one_step;
                NAME(tiles)
                (x, job->one_step, y, job->other_step, stop - start, 1, start < safe ? padded : columns, part);
                for (long r = 0; r < ROWS && i + r < job->rows; r++)
                    for (long j = 0; j < columns; j++)
                        job->out[(i + r) * job->columns + first + j] += part[r * CHUNK + j];
            }
        }
    }
}

/* What float16 holds: its subnormal numbers are multiples of 2^-24, and what is larger than it can say is infinite. */
static inline TARGET floats NAME(round_float16)(floats exact)
{
    words bits = (words)exact, sign = bits & 0x80000000, size = bits ^ sign;
    words normal = (size + 0xfff + ((size >> 13) & 1)) & 0xffffe000;
    words small = (words)((floats)size + 0.5f) - 0x3f000000; /* 0.5 has 2^-24 for its last place */
    words subnormal = (words)(__builtin_convertvector(small, floats) * 0x1p-24f);
    words is_small = (words)(size < 0x38800000), is_large = (words)(normal > 0x477fe000) & (words)(size <= 0x7f800000);
    words rounded = (is_small & subnormal) | (~is_small & ((is_large & 0x7f800000) | (~is_large & normal)));
    return (floats)(rounded | sign);
}

/* For each of some weights and what is added to them: |Δ|² and |W|², then gain and loss as bfloat16, float16, float32. */
static TARGET void NAME(rounding)(const float *weights, const float *deltas, long count, double total[8])
{
    for (long start = 0; start < count; start += RUN) {
        long stop = count - start < RUN ? count : start + RUN;
        floats sums[8] = {{0}};
        for (long j = start; j < stop; j += LANES) {
            int lacks = j + LANES <= stop ? 0 : (int)(j + LANES - stop);
            floats weight, delta;
            LOAD(weight, weights + j, lacks);
            LOAD(delta, deltas + j, lacks);
            floats merged = weight + delta;
            floats stored[3] = {NAME(widen)(NAME(round)(merged)), NAME(round_float16)(merged), merged};
            sums[0] += delta * delta;
            sums[1] += weight * weight;
            for (int d = 0; d < 3; d++) {
                floats moved = stored[d] - weight, lost = moved - delta;
                sums[2 + 2 * d] += moved * delta;
                sums[3 + 2 * d] += lost * lost;
            }
        }
        for (int s = 0; s < 8; s++)
            for (int lane = 0; lane < LANES; lane++)
                total[s] += sums[s][lane];
    }
}

#undef floats
#undef words
#undef halves
#undef LOAD
#undef STORE
