/* What the two longest streams of the program do with each element, in one pass over memory.

   merge: Q(W + s·B·A) and what rounding took of it; drift: the sums of W1 - W0. `portllm.patch.merge` and
   `portllm.assess.drift_kernel` say the same with torch and numpy: the tests hold the bytes to be equal, and the sums to
   within rounding. Python's lock is free while a call runs. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define ROWS 4    /* of a tile of the product */
#define CHUNK 512 /* columns of a delta in memory at once: with ROWS, 8 KiB */
#define RUN 4096  /* elements whose squares are added in float32 before they are in float64 */

/* Weights and output of shape (rows, width), row-major; B of shape (rows, rank), A of shape (rank, width). */
struct merge {
    const void *stored;
    void *out;
    const float *b, *a;
    long rows, rank, width;
    float scale;
    int is_float32;
};

#if defined(__x86_64__)

#define NAME(function) function##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define TILE 2
#include "loops.h"
#undef NAME
#undef TARGET
#undef LANES
#undef TILE

#define NAME(function) function##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#define LANES 16
#define TILE 2
#include "loops.h"
#undef NAME
#undef TARGET
#undef LANES
#undef TILE

#else

#define NAME(function) function##_plain
#define TARGET
#define LANES 4
#define TILE 2
#include "loops.h"

#endif

struct variant {
    const char *name;
    void (*merge)(const struct merge *, double[4]);
    void (*drift)(const uint16_t *, const uint16_t *, long, double[3]);
};

#if defined(__x86_64__)

static const struct variant variants[] = {{"avx2", merge_avx2, drift_avx2}, {"avx512", merge_avx512, drift_avx512}};

/* How many of the variants this processor can run: the second needs what the first needs, and more. */
static int count_runnable(void)
{
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? 2
               : 1;
}

#else

static const struct variant variants[] = {{"plain", merge_plain, drift_plain}};

/* The bytes of a file are little-endian, and are taken as they are. */
static int count_runnable(void)
{
    return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
}

#endif

static const struct variant *chosen; /* the last one that the processor can run, or what a test asked for */

static PyObject *no_variant(void)
{
    PyErr_SetString(PyExc_RuntimeError, "this processor cannot run the loops");
    return NULL;
}

static PyObject *py_merge(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer stored, b, a, out;
    double scale;
    Py_ssize_t rank;
    int is_float32;
    if (!PyArg_ParseTuple(args, "y*y*y*dw*np", &stored, &b, &a, &scale, &out, &rank, &is_float32))
        return NULL;
    struct merge job = {stored.buf, out.buf, b.buf, a.buf, 0, rank, 0, (float)scale, is_float32};
    Py_ssize_t width = is_float32 ? 4 : 2;
    if (rank > 0) {
        job.rows = b.len / (4 * rank);
        job.width = a.len / (4 * rank);
    }
    int fits = rank > 0 && b.len == 4 * rank * job.rows && a.len == 4 * rank * job.width &&
               stored.len == width * job.rows * job.width && out.len == stored.len;
    double total[4] = {0};
    if (fits && chosen) {
        Py_BEGIN_ALLOW_THREADS
        chosen->merge(&job, total);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&stored);
    PyBuffer_Release(&b);
    PyBuffer_Release(&a);
    PyBuffer_Release(&out);
    if (!chosen)
        return no_variant();
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the sizes of weight, factors and output do not fit each other");
        return NULL;
    }
    return Py_BuildValue("(dddd)", total[0], total[1], total[2], total[3]);
}

static PyObject *py_drift(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer base, evolved;
    if (!PyArg_ParseTuple(args, "y*y*", &base, &evolved))
        return NULL;
    int fits = base.len == evolved.len && base.len % 2 == 0;
    double total[3] = {0};
    if (fits && chosen) {
        Py_BEGIN_ALLOW_THREADS
        chosen->drift(base.buf, evolved.buf, base.len / 2, total);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&base);
    PyBuffer_Release(&evolved);
    if (!chosen)
        return no_variant();
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "base and evolved do not have the same number of elements");
        return NULL;
    }
    return Py_BuildValue("(ddd)", total[0], total[1], total[2]);
}

static PyObject *py_variants(PyObject *module, PyObject *args)
{
    (void)module;
    (void)args;
    int count = count_runnable();
    PyObject *names = PyTuple_New(count);
    for (int i = 0; names && i < count; i++)
        PyTuple_SetItem(names, i, PyUnicode_FromString(variants[i].name));
    return names;
}

static PyObject *py_choose(PyObject *module, PyObject *name)
{
    (void)module;
    const char *wanted = PyUnicode_AsUTF8AndSize(name, NULL);
    if (!wanted)
        return NULL;
    for (int i = 0; i < count_runnable(); i++)
        if (!strcmp(variants[i].name, wanted)) {
            chosen = &variants[i];
            Py_RETURN_NONE;
        }
    PyErr_Format(PyExc_ValueError, "this processor cannot run '%s'", wanted);
    return NULL;
}

static PyMethodDef methods[] = {
    {"merge", py_merge, METH_VARARGS, NULL},
    {"drift", py_drift, METH_VARARGS, NULL},
    {"variants", py_variants, METH_NOARGS, NULL},
    {"choose", py_choose, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_kernels(void)
{
    int count = count_runnable();
    chosen = count ? &variants[count - 1] : NULL;
    return PyModule_Create(&definition);
}
