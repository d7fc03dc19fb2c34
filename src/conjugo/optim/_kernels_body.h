/* The loops of _kernels.c for one element type: T, SUFFIX(name).
 *
 * x = SCALE * gradient + DECAY * parameter is the gradient that the method sees. `#pragma omp simd reduction` lets the compiler
 * vectorise the sums without -ffast-math, which would be free to drop the checks for non-finite values. Sums run in T over
 * RUN elements, some dozens per vector lane, and in double from there on: half the work of all double, and the rounding errors
 * (about 1e-9 of a dot product of millions) are far below those of the gradients.
 */

#define EFFECTIVE(i) ((flags & F_DECAY) ? scale * g[i] + decay * p[i] : g[i])
/* P x of the value x, where h[i] is v: an approximation of the Hessian, a mean of squares, P x already, or nothing */
#define PRECONDITIONED(x, v)                                                                                             \
    ((flags & F_GIVEN)     ? (v)                                                                                         \
     : (flags & F_SQUARE)  ? (x) / (ROOT(v) * gain + eps)                                                                \
     : (flags & F_HESSIAN) ? (x) / ((v) + eps)                                                                           \
                           : (x))
#define READ(h, i) ((flags & (F_GIVEN | F_SQUARE | F_HESSIAN)) ? h[i] : 0)

/* |x|^2, <x, d>, <x, P prev>, |d|^2 */
INLINE void SUFFIX(gradient)(const T *restrict p, const T *restrict g, const T *restrict prev, const T *restrict h,
                             const T *restrict d, int64_t n, const double *c, double *out, const int flags) {
    double sum_xx = 0, sum_xd = 0, sum_cross = 0, sum_dd = 0;
    const T scale = (T)c[SCALE], decay = (T)c[DECAY], eps = (T)c[EPS], gain = (T)c[GAIN];
    for (int64_t start = 0; start < n; start += RUN) {
        const int64_t end = start + RUN < n ? start + RUN : n;
        T xx = 0, xd = 0, cross = 0, dd = 0;
#pragma omp simd reduction(+ : xx, xd, cross, dd)
        for (int64_t i = start; i < end; i++) {
            const T x = EFFECTIVE(i);
            xx += x * x;
            if (flags & F_DIRECTION) xd += x * d[i], dd += d[i] * d[i];
            if (flags & F_CROSS) cross += x * PRECONDITIONED(prev[i], READ(h, i));
        }
        sum_xx += (double)xx, sum_xd += (double)xd, sum_cross += (double)cross, sum_dd += (double)dd;
    }
    out[0] = sum_xx, out[1] = sum_xd, out[2] = sum_cross, out[3] = sum_dd;
}

/* |x - prev|^2 */
INLINE void SUFFIX(difference)(const T *restrict p, const T *restrict g, const T *restrict prev, int64_t n, const double *c,
                               double *out, const int flags) {
    double sum_yy = 0;
    const T scale = (T)c[SCALE], decay = (T)c[DECAY];
    for (int64_t start = 0; start < n; start += RUN) {
        const int64_t end = start + RUN < n ? start + RUN : n;
        T yy = 0;
#pragma omp simd reduction(+ : yy)
        for (int64_t i = start; i < end; i++) {
            const T y = EFFECTIVE(i) - prev[i];
            yy += y * y;
        }
        sum_yy += (double)yy;
    }
    out[0] = sum_yy, out[1] = out[2] = out[3] = 0;
}

/* h <- bounded(h - (ROOT_B h d)^2 + (ROOT_A y)^2 + SHIFT), prev <- x; <x, P x>, <d, H d>, |P x|^2, <P x, d> */
INLINE void SUFFIX(precondition)(const T *restrict p, const T *restrict g, T *restrict prev, T *restrict h,
                                 const T *restrict d, int64_t n, const double *c, double *out, const int flags) {
    double sum_rho = 0, sum_dhd = 0, sum_zz = 0, sum_zd = 0;
    const T scale = (T)c[SCALE], decay = (T)c[DECAY], eps = (T)c[EPS], root_a = (T)c[ROOT_A], root_b = (T)c[ROOT_B];
    const T shift = (T)c[SHIFT], low = (T)c[LOW], high = (T)c[HIGH];
    for (int64_t start = 0; start < n; start += RUN) {
        const int64_t end = start + RUN < n ? start + RUN : n;
        T rho = 0, dhd = 0, zz = 0, zd = 0;
#pragma omp simd reduction(+ : rho, dhd, zz, zd)
        for (int64_t i = start; i < end; i++) {
            const T x = EFFECTIVE(i);
            T v = h[i];
            if (flags & F_UPDATE) {
                const T s = v * d[i] * root_b, y = (x - prev[i]) * root_a;
                v = v - s * s + y * y + shift;
                if (flags & F_ABSOLUTE) v = v < 0 ? -v : v;
                v = v < low ? low : v;
                v = v > high ? high : v;
                h[i] = v;
            }
            prev[i] = x;
            const T z = x / (v + eps);
            rho += x * z, dhd += v * d[i] * d[i], zz += z * z, zd += z * d[i];
        }
        sum_rho += (double)rho, sum_dhd += (double)dhd, sum_zz += (double)zz, sum_zd += (double)zd;
    }
    out[0] = sum_rho, out[1] = sum_dhd, out[2] = sum_zz, out[3] = sum_zd;
}

/* As above with the means of squares h <- MEMORY h + NEW x^2, or with P x in the place of h; those with d for F_DIRECTION only */
INLINE void SUFFIX(rescale)(const T *restrict p, const T *restrict g, T *restrict h, const T *restrict d, int64_t n,
                            const double *c, double *out, const int flags) {
    double sum_rho = 0, sum_zz = 0, sum_zd = 0;
    const T scale = (T)c[SCALE], decay = (T)c[DECAY], eps = (T)c[EPS], gain = (T)c[GAIN], memory = (T)c[MEMORY], new = (T)c[NEW];
    for (int64_t start = 0; start < n; start += RUN) {
        const int64_t end = start + RUN < n ? start + RUN : n;
        T rho = 0, zz = 0, zd = 0;
#pragma omp simd reduction(+ : rho, zz, zd)
        for (int64_t i = start; i < end; i++) {
            const T x = EFFECTIVE(i);
            T v = h[i];
            if (flags & F_SQUARE) {
                v = memory * v + new * x * x;
                h[i] = v;
            }
            const T z = PRECONDITIONED(x, v);
            rho += x * z;
            if (flags & F_DIRECTION) zz += z * z, zd += z * d[i];
        }
        sum_rho += (double)rho, sum_zz += (double)zz, sum_zd += (double)zd;
    }
    out[0] = sum_rho, out[1] = 0, out[2] = sum_zz, out[3] = sum_zd;
}

/* d <- -P x + BETA d, p <- KEEP p + UNDO d_old + TAU d; <x, d>, |d|^2 */
INLINE void SUFFIX(move)(T *restrict p, const T *restrict g, T *restrict prev, const T *restrict h, T *restrict d, int64_t n,
                         const double *c, double *out, const int flags) {
    double sum_xd = 0, sum_dd = 0;
    const T scale = (T)c[SCALE], decay = (T)c[DECAY], eps = (T)c[EPS], beta = (T)c[BETA], tau = (T)c[TAU];
    const T undo = (T)c[UNDO], keep = (T)c[KEEP], gain = (T)c[GAIN];
    for (int64_t start = 0; start < n; start += RUN) {
        const int64_t end = start + RUN < n ? start + RUN : n;
        T xd = 0, dd = 0;
#pragma omp simd reduction(+ : xd, dd)
        for (int64_t i = start; i < end; i++) {
            const T x = EFFECTIVE(i), old = d[i];
            const T direction = old * beta - PRECONDITIONED(x, READ(h, i));
            const T kept = (flags & F_UNDO) ? p[i] * keep + old * undo : p[i] * keep;
            p[i] = kept + direction * tau;
            d[i] = direction;
            if (flags & F_STORE) prev[i] = x;
            xd += x * direction, dd += direction * direction;
        }
        sum_xd += (double)xd, sum_dd += (double)dd;
    }
    out[0] = sum_xd, out[1] = sum_dd, out[2] = out[3] = 0;
}

/* m <- BETA m + GAIN x, p <- KEEP p - TAU m - LOOK x; without F_DIRECTION there is no m */
INLINE void SUFFIX(momentum)(T *restrict p, const T *restrict g, T *restrict m, int64_t n, const double *c, const int flags) {
    const T scale = (T)c[SCALE], decay = (T)c[DECAY], beta = (T)c[BETA], gain = (T)c[GAIN], keep = (T)c[KEEP];
    const T tau = (T)c[TAU], look = (T)c[LOOK];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        const T x = EFFECTIVE(i), kept = p[i] * keep;
        if (flags & F_DIRECTION) {
            const T momentum = m[i] * beta + x * gain;
            m[i] = momentum;
            p[i] = (flags & F_LOOK) ? kept - momentum * tau - x * look : kept - momentum * tau;
        } else
            p[i] = kept - x * look;
    }
}

#undef EFFECTIVE
#undef PRECONDITIONED
#undef READ

/* <row, v> for each of the rows, then the smallest and the largest value of v, over begin..end-1; NaN makes both NaN. */
CLONES static void SUFFIX(products)(const Line *line, int64_t begin, int64_t end, double *out) {
    const T *v = (const T *)(uintptr_t)line->v;
    double sums[MOST_ROWS] = {0};
    T low = v[begin], high = v[begin], invalid = 0;
    for (int64_t start = begin; start < end; start += RUN) {
        const int64_t stop = start + RUN < end ? start + RUN : end;
        for (int j = 0; j < line->n_rows; j++) {
            const T *row = (const T *)(uintptr_t)line->rows[j];
            T sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = start; i < stop; i++) sum += row[i] * v[i];
            sums[j] += (double)sum;
        }
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : invalid)
        for (int64_t i = start; i < stop; i++) {
            low = v[i] < low ? v[i] : low;
            high = v[i] > high ? v[i] : high;
            invalid += v[i] - v[i]; /* 0, or NaN for NaN and infinity */
        }
    }
    for (int j = 0; j < line->n_rows; j++) out[j] = sums[j];
    out[line->n_rows] = (double)(low + invalid), out[line->n_rows + 1] = (double)(high + invalid);
}

/* A point between base and last (unless part is 1), the next direction from it, and the next trial point:
 * x <- base - part step p, g <- g_base + part (g_last - g_base), y_kept <- g - g_base if there is room for it,
 * p_new <- g + beta p + gamma p_kept, trial <- x - next p_new. */
CLONES static void SUFFIX(turn)(const Turn *t, int64_t begin, int64_t end) {
#define AT(field) ((T *)(uintptr_t)t->field)
    const T *base = AT(base), *g_base = AT(g_base), *p_kept = AT(p_kept);
    T *x = AT(x), *g = AT(g), *p = AT(p), *p_new = AT(p_new), *y_kept = AT(y_kept), *trial = AT(trial);
    const T *g_last = AT(g_last);
#undef AT
    const T part = (T)t->part, step = (T)(t->part * t->step), beta = (T)t->beta, gamma = (T)t->gamma, next = (T)t->next;
    const int between = t->part != 1;
    for (int64_t start = begin; start < end; start += RUN) {
        const int64_t stop = start + RUN < end ? start + RUN : end;
        if (between) {
#pragma omp simd
            for (int64_t i = start; i < stop; i++) {
                x[i] = base[i] - step * p[i];
                g[i] = g_base[i] + part * (g_last[i] - g_base[i]);
            }
        }
        if (y_kept) {
#pragma omp simd
            for (int64_t i = start; i < stop; i++) y_kept[i] = g[i] - g_base[i];
        }
#pragma omp simd
        for (int64_t i = start; i < stop; i++) {
            T direction = g[i] + beta * p[i];
            if (p_kept) direction += gamma * p_kept[i];
            p_new[i] = direction;
            trial[i] = x[i] - next * direction;
        }
    }
}

/* The flags of the hot cases are constants where the loops are inlined, so that no test stays inside them. */
CLONES static void SUFFIX(run)(const Job *job, int op, int flags, Py_ssize_t begin, Py_ssize_t end) {
    for (Py_ssize_t b = begin; b < end; b++) {
        const Block *block = job->blocks + b;
        const int64_t *at = job->pointers + block->tensor * N_POINTERS;
        const double *c = job->coefficients + block->tensor * N_COEFFICIENTS;
        const int64_t n = block->length;
        double *out = job->sums + b * N_SUMS;
#define AT(which) (at[which] ? (T *)(uintptr_t)at[which] + block->start : (T *)0)
        T *p = AT(PARAM), *g = AT(GRAD), *prev = AT(PREV), *h = AT(HESS), *d = AT(DIR);
#undef AT
        int on = flags | ((c[SCALE] != 1 || c[DECAY] != 0) ? F_DECAY : 0) | (int)c[FORM];
        if (op == OP_MOMENTUM) on |= (d ? F_DIRECTION : 0) | (c[LOOK] != 0 ? F_LOOK : 0);
#define CASE(which, call)                                                                                                \
    case (which): {                                                                                                      \
        const int f = (which);                                                                                           \
        call;                                                                                                            \
        break;                                                                                                           \
    }
#define OTHER(call)                                                                                                      \
    default: {                                                                                                           \
        const int f = on;                                                                                                \
        call;                                                                                                            \
    }
        switch (op) {
        case OP_GRADIENT:
            if (!(on & F_CROSS)) on &= ~(F_SQUARE | F_GIVEN);
#define CALL SUFFIX(gradient)(p, g, prev, h, d, n, c, out, f)
            switch (on) {
                CASE(0, CALL)
                CASE(F_DECAY, CALL)
                CASE(F_DIRECTION, CALL)
                CASE(F_DIRECTION | F_DECAY, CALL)
                CASE(F_CROSS, CALL)
                CASE(F_CROSS | F_DECAY, CALL)
                CASE(F_CROSS | F_SQUARE, CALL)
                CASE(F_CROSS | F_GIVEN, CALL)
                CASE(F_DIRECTION | F_CROSS | F_HESSIAN, CALL)
                CASE(F_DIRECTION | F_CROSS | F_HESSIAN | F_DECAY, CALL)
                OTHER(CALL)
            }
#undef CALL
            break;
        case OP_DIFFERENCE:
            SUFFIX(difference)(p, g, prev, n, c, out, on);
            break;
        case OP_PRECONDITION:
            if (on & (F_SQUARE | F_GIVEN)) {
#define CALL SUFFIX(rescale)(p, g, h, d, n, c, out, f)
                switch (on) {
                    CASE(F_SQUARE, CALL)
                    CASE(F_SQUARE | F_DECAY, CALL)
                    CASE(F_SQUARE | F_DIRECTION, CALL)
                    CASE(F_GIVEN, CALL)
                    CASE(F_GIVEN | F_DIRECTION, CALL)
                    OTHER(CALL)
                }
#undef CALL
                break;
            }
#define CALL SUFFIX(precondition)(p, g, prev, h, d, n, c, out, f)
            switch (on) {
                CASE(0, CALL)
                CASE(F_DECAY, CALL)
                CASE(F_UPDATE, CALL)
                CASE(F_UPDATE | F_DECAY, CALL)
                OTHER(CALL)
            }
#undef CALL
            break;
        case OP_MOMENTUM:
#define CALL SUFFIX(momentum)(p, g, d, n, c, f)
            switch (on) {
                CASE(F_DIRECTION, CALL)
                CASE(F_DIRECTION | F_DECAY, CALL)
                CASE(F_DIRECTION | F_LOOK, CALL)
                CASE(F_DIRECTION | F_LOOK | F_DECAY, CALL)
                CASE(F_LOOK, CALL)
                CASE(F_LOOK | F_DECAY, CALL)
                OTHER(CALL)
            }
#undef CALL
            break;
        default:
#define CALL SUFFIX(move)(p, g, prev, h, d, n, c, out, f)
            switch (on) {
                CASE(0, CALL)
                CASE(F_DECAY, CALL)
                CASE(F_STORE, CALL)
                CASE(F_STORE | F_DECAY, CALL)
                CASE(F_SQUARE, CALL)
                CASE(F_SQUARE | F_DECAY, CALL)
                CASE(F_GIVEN, CALL)
                CASE(F_HESSIAN, CALL)
                CASE(F_HESSIAN | F_DECAY, CALL)
                CASE(F_HESSIAN | F_UNDO, CALL)
                CASE(F_HESSIAN | F_UNDO | F_DECAY, CALL)
                OTHER(CALL)
            }
#undef CALL
        }
#undef CASE
#undef OTHER
    }
}
