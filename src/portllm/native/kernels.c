/* What the longest streams of the program do with each element, in one pass over memory.

   merge: Q(W + s·B·A) and what rounding took of it; drift: the sums of W1 - W0; products and rounding: what a check asks
   of each of many patches. `portllm.patch.merge` and `portllm.measures` (drift_kernel, overlap, kept_gain) say the same
   with torch and numpy: the tests hold the bytes to be equal, and the sums to within rounding. Python's lock is free
   while a call runs. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#define ROWS 4    /* of a tile of the product */
#define CHUNK 512 /* columns of a delta in memory at once: with ROWS, 8 KiB */
#define RUN 4096  /* elements whose products LANES sums in float32 take, before they are added in float64 */
#define TERMS 256 /* the same of one sum */

/* Weights and output of shape (rows, width), row-major; B of shape (rows, rank), A of shape (rank, width). */
struct merge {
    const void *stored;
    void *out;
    const float *b, *a;
    long rows, rank, width;
    float scale;
    int is_float32;
};

/* X of shape (rows, width), Y of shape (columns, width); `out` of shape (rows, columns), row-major, zeros before. From
   one row of X to the next there are one_stride elements, from one element of a row to the next one_step; so for Y. */
struct products {
    const float *one, *other;
    double *out;
    long rows, columns, width, one_stride, one_step, other_stride, other_step;
};

#if defined(__x86_64__)

#define NAME(function) function##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define TILE 2
#define ACROSS 2 /* with ROWS, as many sums as there are registers for */
#include "loops.h"
#undef NAME
#undef TARGET
#undef LANES
#undef TILE
#undef ACROSS

#define NAME(function) function##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#define LANES 16
#define TILE 2
#define ACROSS 4
#include "loops.h"
#undef NAME
#undef TARGET
#undef LANES
#undef TILE
#undef ACROSS

#else

#define NAME(function) function##_plain
#define TARGET
#define LANES 4
#define TILE 2
#define ACROSS 4
#include "loops.h"

#endif

struct variant {
    const char *name;
    void (*merge)(const struct merge *, double[4]);
    void (*drift)(const uint16_t *, const uint16_t *, long, double[3]);
    void (*products_of_rows)(const struct products *);
    void (*products_of_columns)(const struct products *);
    void (*rounding)(const float *, const float *, long, double[8]);
};

#define VARIANT(name)                                                                                                  \
    {                                                                                                                  \
        #name, merge_##name, drift_##name, products_of_rows_##name, products_of_columns_##name, rounding_##name        \
    }

#if defined(__x86_64__)

static const struct variant variants[] = {VARIANT(avx2), VARIANT(avx512)};

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

static const struct variant variants[] = {VARIANT(plain)};

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

/* A stack of matrices of float32, wherever their elements lie; or an error. */
static int get_stack(PyObject *object, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT))
        return -1;
    int fits = view->ndim == 3 && view->itemsize == 4 && !strcmp(view->format, "f");
    for (int axis = 0; fits && axis < 3; axis++)
        fits = view->strides[axis] % 4 == 0;
    if (fits)
        return 0;
    PyBuffer_Release(view);
    PyErr_SetString(PyExc_ValueError, "stacks of matrices of float32 are needed");
    return -1;
}

static PyObject *py_products(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *one_object, *other_object;
    Py_buffer one, other, out;
    if (!PyArg_ParseTuple(args, "OOw*", &one_object, &other_object, &out))
        return NULL;
    if (get_stack(one_object, &one)) {
        PyBuffer_Release(&out);
        return NULL;
    }
    if (get_stack(other_object, &other)) {
        PyBuffer_Release(&one);
        PyBuffer_Release(&out);
        return NULL;
    }
    Py_ssize_t count = one.shape[0];
    struct products job = {.rows = one.shape[1], .columns = other.shape[1], .width = one.shape[2],
                           .one_stride = one.strides[1] / 4, .one_step = one.strides[2] / 4,
                           .other_stride = other.strides[1] / 4, .other_step = other.strides[2] / 4};
    if (job.width < 2) /* what lies between the elements of an axis that has one of them says nothing */
        job.one_step = job.other_step = 1;
    if (job.columns < 2)
        job.other_stride = 1;
    int by_rows = job.one_step == 1 && job.other_step == 1, by_columns = job.other_stride == 1 && job.other_step > 0;
    int fits = (by_rows || by_columns) && other.shape[0] == count && other.shape[2] == job.width &&
               out.len == (Py_ssize_t)sizeof(double) * count * job.rows * job.columns;
    if (fits && chosen) {
        Py_BEGIN_ALLOW_THREADS
        memset(out.buf, 0, (size_t)out.len);
        for (Py_ssize_t n = 0; n < count; n++) {
            job.one = (const float *)((const char *)one.buf + n * one.strides[0]);
            job.other = (const float *)((const char *)other.buf + n * other.strides[0]);
            job.out = (double *)out.buf + n * job.rows * job.columns;
            (by_rows ? chosen->products_of_rows : chosen->products_of_columns)(&job);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&one);
    PyBuffer_Release(&other);
    PyBuffer_Release(&out);
    if (!chosen)
        return no_variant();
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "the matrices and the output do not fit each other");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_rounding(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer weights, deltas, out;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "y*y*w*n", &weights, &deltas, &out, &count))
        return NULL;
    int fits = weights.len == deltas.len && count >= 0 && out.len == (Py_ssize_t)sizeof(double) * 8 * count &&
               (count ? weights.len % (4 * count) == 0 : !weights.len);
    if (fits && chosen) {
        Py_BEGIN_ALLOW_THREADS
        memset(out.buf, 0, (size_t)out.len);
        for (Py_ssize_t n = 0; n < count; n++) {
            long width = (long)(weights.len / (4 * count));
            chosen->rounding((const float *)weights.buf + n * width, (const float *)deltas.buf + n * width, width,
                             (double *)out.buf + 8 * n);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&weights);
    PyBuffer_Release(&deltas);
    PyBuffer_Release(&out);
    if (!chosen)
        return no_variant();
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "weights, deltas and output do not fit each other");
        return NULL;
    }
    Py_RETURN_NONE;
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
    {"products", py_products, METH_VARARGS, NULL},
    {"rounding", py_rounding, METH_VARARGS, NULL},
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
