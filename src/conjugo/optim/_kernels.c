/* The vector work of the optimizers' steps on CPU tensors: few passes over memory.
 *
 * Optional: without this module the optimizers take their PyTorch paths, which are the specification (see _passes.py and
 * _updates.py).
 * Works on blocks of flat, equally laid out tensors. Sums are written per block, so that their total does not depend on how
 * the blocks are shared out over threads.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>

enum { PARAM, GRAD, PREV, HESS, DIR, N_POINTERS };
enum {
    SCALE, DECAY, EPS, ROOT_A, ROOT_B, SHIFT, LOW, HIGH, BETA, TAU, UNDO, KEEP, GAIN, LOOK, MEMORY, NEW, FORM, N_COEFFICIENTS
};
enum { N_SUMS = 4, RUN = 512 };
enum { OP_GRADIENT, OP_DIFFERENCE, OP_PRECONDITION, OP_MOVE, OP_MOMENTUM };
enum { F_DECAY = 1, F_DIRECTION = 2, F_CROSS = 4, F_HESSIAN = 8, F_UPDATE = 16, F_ABSOLUTE = 32, F_STORE = 64, F_UNDO = 128 };
enum { F_LOOK = 256 }; /* found out by the kernel itself, tensor by tensor, like F_DECAY (and F_DIRECTION in OP_MOMENTUM) */
enum { F_SQUARE = 512, F_GIVEN = 1024 }; /* what HESS is, tensor by tensor, in the coefficient FORM: means of squares; P x itself */

typedef struct {
    int64_t tensor, start, length;
} Block;

typedef struct {
    const int64_t *pointers;   /* [tensors, N_POINTERS] addresses */
    const double *coefficients; /* [tensors, N_COEFFICIENTS] */
    const Block *blocks;
    double *sums; /* [blocks, N_SUMS] */
} Job;

/* What classical conjugate gradients do along a line; addresses of n values each. */
enum { MOST_ROWS = 8 };

typedef struct {
    int64_t v, rows[MOST_ROWS];
    int n_rows;
} Line;

typedef struct {
    int64_t base, x, g_base, g_last, g, p, p_new, p_kept, y_kept, trial; /* p_kept, y_kept: 0 without */
    double part, step, beta, gamma, next;
} Turn;

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

#define T float
#define ROOT sqrtf
#define SUFFIX(name) name##_f32
#include "_kernels_body.h"
#undef T
#undef ROOT
#undef SUFFIX

#define T double
#define ROOT sqrt
#define SUFFIX(name) name##_f64
#include "_kernels_body.h"

static PyObject *run(PyObject *self, PyObject *args) {
    (void)self;
    int op, flags, is_double;
    unsigned long long pointers, coefficients, blocks, sums;
    Py_ssize_t begin, end;
    if (!PyArg_ParseTuple(args, "iipKKKKnn", &op, &flags, &is_double, &pointers, &coefficients, &blocks, &sums, &begin, &end))
        return NULL;
    if (op < OP_GRADIENT || op > OP_MOMENTUM) {
        PyErr_SetString(PyExc_ValueError, "no such operation");
        return NULL;
    }
    Job job = {(const int64_t *)(uintptr_t)pointers, (const double *)(uintptr_t)coefficients,
               (const Block *)(uintptr_t)blocks, (double *)(uintptr_t)sums};
    Py_BEGIN_ALLOW_THREADS
    if (is_double)
        run_f64(&job, op, flags, begin, end);
    else
        run_f32(&job, op, flags, begin, end);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *products(PyObject *self, PyObject *args) {
    (void)self;
    int is_double;
    unsigned long long v, out;
    Py_ssize_t begin, end;
    PyObject *rows;
    Line line;
    if (!PyArg_ParseTuple(args, "pKO!Knn", &is_double, &v, &PyTuple_Type, &rows, &out, &begin, &end)) return NULL;
    line.n_rows = (int)PyTuple_Size(rows);
    if (line.n_rows > MOST_ROWS || begin >= end) {
        PyErr_SetString(PyExc_ValueError, "too many rows, or no values");
        return NULL;
    }
    line.v = (int64_t)v;
    for (int j = 0; j < line.n_rows; j++) line.rows[j] = PyLong_AsLongLong(PyTuple_GetItem(rows, j));
    if (PyErr_Occurred()) return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (is_double)
        products_f64(&line, begin, end, (double *)(uintptr_t)out);
    else
        products_f32(&line, begin, end, (double *)(uintptr_t)out);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *turn(PyObject *self, PyObject *args) {
    (void)self;
    int is_double;
    Py_ssize_t begin, end;
    Turn t;
    long long a[10];
    if (!PyArg_ParseTuple(args, "p(LLLLLLLLLL)(ddddd)nn", &is_double, a, a + 1, a + 2, a + 3, a + 4, a + 5, a + 6, a + 7, a + 8,
                          a + 9, &t.part, &t.step, &t.beta, &t.gamma, &t.next, &begin, &end))
        return NULL;
    t.base = a[0], t.x = a[1], t.g_base = a[2], t.g_last = a[3], t.g = a[4], t.p = a[5], t.p_new = a[6], t.p_kept = a[7];
    t.y_kept = a[8], t.trial = a[9];
    Py_BEGIN_ALLOW_THREADS
    if (is_double)
        turn_f64(&t, begin, end);
    else
        turn_f32(&t, begin, end);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"products", products, METH_VARARGS,
     "products(is_double, v, rows, out, begin, end): <row, v> for each of the rows, and the smallest and largest value of v, "
     "over begin..end-1; addresses, out of len(rows) + 2 doubles."},
    {"turn", turn, METH_VARARGS,
     "turn(is_double, (base, x, g_base, g_last, g, p, p_new, p_kept, y_kept, trial), (part, step, beta, gamma, next), begin, end)"},
    {"run", run, METH_VARARGS,
     "run(op, flags, is_double, pointers, coefficients, blocks, sums, begin, end): one pass over blocks begin..end-1; "
     "the four tables are given by address."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void) {
    PyObject *m = PyModule_Create(&module);
    if (m == NULL) return NULL;
#define EXPORT(name) PyModule_AddIntConstant(m, #name, name)
    if (EXPORT(PARAM) || EXPORT(GRAD) || EXPORT(PREV) || EXPORT(HESS) || EXPORT(DIR) || EXPORT(N_POINTERS) ||
        EXPORT(SCALE) || EXPORT(DECAY) || EXPORT(EPS) || EXPORT(ROOT_A) || EXPORT(ROOT_B) || EXPORT(SHIFT) || EXPORT(LOW) ||
        EXPORT(HIGH) || EXPORT(BETA) || EXPORT(TAU) || EXPORT(UNDO) || EXPORT(KEEP) || EXPORT(GAIN) || EXPORT(LOOK) ||
        EXPORT(MEMORY) || EXPORT(NEW) || EXPORT(FORM) || EXPORT(F_SQUARE) || EXPORT(F_GIVEN) ||
        EXPORT(N_COEFFICIENTS) || EXPORT(N_SUMS) || EXPORT(OP_MOMENTUM) || EXPORT(OP_GRADIENT) || EXPORT(OP_DIFFERENCE) || EXPORT(OP_PRECONDITION) || EXPORT(OP_MOVE) ||
        EXPORT(F_DECAY) || EXPORT(F_DIRECTION) || EXPORT(F_CROSS) || EXPORT(F_HESSIAN) || EXPORT(F_UPDATE) ||
        EXPORT(F_ABSOLUTE) || EXPORT(F_STORE) || EXPORT(F_UNDO)) {
        Py_DECREF(m);
        return NULL;
    }
    return m;
}
