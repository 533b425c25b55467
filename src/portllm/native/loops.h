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
        if (lacks) {                                                                                                   \
            memset(&(vector), 0, sizeof(vector));                                                                      \
            memcpy(&(vector), from, sizeof(vector) / LANES * (size_t)(LANES - (lacks)));                               \
        } else                                                                                                         \
            memcpy(&(vector), from, sizeof(vector));                                                                   \
    } while (0)
#define STORE(vector, to, lacks) memcpy(to, &(vector), sizeof(vector) / LANES * (size_t)(LANES - (lacks)))

/* ROWS rows of `count` vectors of the delta: scale · (b0·a0 + b1·a1 + ...), each term added by one fused multiply-add
   where the processor has it, in order. */
static inline __attribute__((always_inline)) TARGET void
NAME(tile)(const float *const b[ROWS], const float *a, long stride, long rank, float scale, int count, int lacks,
           float *out)
{
    floats sum[ROWS][TILE] = {{{0}}};
    for (long k = 0; k < rank; k++)
        for (int t = 0; t < count; t++) {
            floats right;
            LOAD(right, a + k * stride + t * LANES, lacks);
            for (int i = 0; i < ROWS; i++)
                sum[i][t] += b[i][k] * right;
        }
    for (int i = 0; i < ROWS; i++)
        for (int t = 0; t < count; t++) {
            floats scaled = sum[i][t] * scale;
            memcpy(out + i * CHUNK + t * LANES, &scaled, sizeof scaled);
        }
}

/* Not inlined, so that the sum of weight and delta is not fused with the product by `scale`. */
static __attribute__((noinline)) TARGET void NAME(delta)(const float *const b[ROWS], const float *a, long stride,
                                                         long rank, float scale, long width, float *out)
{
    long j = 0;
    for (; j + TILE * LANES <= width; j += TILE * LANES)
        NAME(tile)(b, a + j, stride, rank, scale, TILE, 0, out + j);
    for (; j + LANES <= width; j += LANES)
        NAME(tile)(b, a + j, stride, rank, scale, 1, 0, out + j);
    if (j < width)
        NAME(tile)(b, a + j, stride, rank, scale, 1, (int)(j + LANES - width), out + j);
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

#undef floats
#undef words
#undef halves
#undef LOAD
#undef STORE
