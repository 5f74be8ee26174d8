// A stand-in for the few cuBLAS and cuSOLVER functions the package calls, on the host's memory.
//
// Signatures, enumerations, column-major storage, checks of arguments and what is not read (the
// other triangle, C where beta is 0) follow the cuBLAS 12 documentation. What that leaves open is
// taken for the worse: more than 65,535 matrices a call are refused, a NaN is a pivot to potrf. Not a GPU run: no speed,
// no rounding of the real library, no asynchrony. A hook decides whether a call is executed now
// or kept to be replayed; another one whether an address range is device memory.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <type_traits>
#include <vector>

namespace {

enum Status { kSuccess = 0, kNotInitialized = 1, kInvalidValue = 7, kExecutionFailed = 13,
              kNotSupported = 15 };
enum { kNo = 0, kTranspose = 1, kConjugate = 2, kLower = 0, kUpper = 1, kNonUnit = 0, kUnit = 1,
       kLeft = 0, kRight = 1 };

constexpr std::uint64_t kMagic = 0x686f737463757064;
constexpr int kMostMatrices = 65535;  // of a call
constexpr std::size_t kScribbled = 4096, kWorkspaceAlignment = 256;

struct Handle {
    std::uint64_t magic = kMagic;
    void* stream = nullptr;
    void* workspace = nullptr;  // of the caller; null: cuBLAS's own
    std::size_t workspace_bytes = 0;
    int pointer_mode = 0, math_mode = 0;
};

using Work = std::function<int()>;
using Hook = int (*)(const char* name, void* stream, int id, void* workspace, std::size_t bytes);
using Check = int (*)(std::uintptr_t start, std::size_t bytes);

Hook hook = nullptr;
Check check = nullptr;
std::vector<Work> kept;

bool valid(const void* handle) {
    return handle != nullptr && static_cast<const Handle*>(handle)->magic == kMagic;
}

template <class... Values>
bool any_negative(Values... values) {
    return ((values < 0) || ...);
}

bool is_operation(int op) { return op == kNo || op == kTranspose || op == kConjugate; }

// Executes or keeps the work; an unfit call never gets here.
int submit(void* handle, const char* name, Work work) {
    const auto* const h = static_cast<const Handle*>(handle);
    if (h->pointer_mode != 0) return kNotSupported;
    void* const workspace = h->workspace;
    const std::size_t bytes = h->workspace_bytes;
    const int answer =
        hook == nullptr ? 0 : hook(name, h->stream, int(kept.size()), workspace, bytes);
    if (answer < 0) return kExecutionFailed;
    Work whole = [=] {  // a workspace is written to: nothing else may lie there
        if (workspace != nullptr) std::memset(workspace, 0xFF, std::min(bytes, kScribbled));
        return work();
    };
    if (answer == 0) return whole();
    kept.push_back(std::move(whole));
    return kSuccess;
}

// Whether `count` matrices of rows x columns values lie in device memory.
template <class T>
bool in_memory(const T* start, long long rows, long long columns, long long ld, long long stride,
               long long count) {
    if (rows == 0 || columns == 0 || count == 0) return true;
    const long long values = (count - 1) * stride + (columns - 1) * ld + rows;
    return check == nullptr || check(std::uintptr_t(start), std::size_t(values) * sizeof(T)) != 0;
}

template <class T>
void copy_transposed(const T* a, int lda, int rows, int columns, std::vector<T>& out) {
    out.resize(std::size_t(rows) * columns);
    for (int j = 0; j < columns; ++j)
        for (int i = 0; i < rows; ++i) out[i + std::size_t(j) * rows] = a[j + std::size_t(i) * lda];
}

// C = alpha op(A) op(B) + beta C
template <class T>
void multiply(int op_a, int op_b, int m, int n, int k, T alpha, const T* a, int lda, const T* b,
              int ldb, T beta, T* c, int ldc) {
    std::vector<T> turned, column(m);
    std::size_t step = lda;
    if (op_a != kNo && alpha != T(0)) {
        copy_transposed(a, lda, m, k, turned);
        a = turned.data();
        step = m;
    }
    for (int j = 0; j < n; ++j) {
        std::fill(column.begin(), column.end(), T(0));
        for (int l = 0; l < k && alpha != T(0); ++l) {
            const T factor = op_b == kNo ? b[l + std::size_t(j) * ldb] : b[j + std::size_t(l) * ldb];
            const T* const values = a + l * step;
            for (int i = 0; i < m; ++i) column[i] += values[i] * factor;
        }
        T* const out = c + std::size_t(j) * ldc;
        for (int i = 0; i < m; ++i)
            out[i] = beta == T(0) ? alpha * column[i] : alpha * column[i] + beta * out[i];
    }
}

struct Bfloat16 {
    std::uint16_t bits;
};

float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
float as_multiplied(Bfloat16 x, bool) { return from_bits(std::uint32_t(x.bits) << 16); }
double as_multiplied(double x, bool) { return x; }
float as_multiplied(float x, bool tensor_float) {  // to 10 bits behind the point, ties to even
    if (!tensor_float) return x;
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return from_bits((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFFu);
}

// What tensor cores read of a matrix of rows x columns values.
template <class T, class S>
std::vector<T> as_read(const S* a, int rows, int columns, int ld, bool tensor_float) {
    std::vector<T> values;
    for (int j = 0; j < columns; ++j)
        for (int i = 0; i < rows; ++i)
            values.push_back(as_multiplied(a[i + std::size_t(j) * ld], tensor_float));
    return values;
}

template <class T, class S>
int gemm(void* handle, const char* name, int op_a, int op_b, int m, int n, int k, const T* alpha,
         const S* a, int lda, long long stride_a, const S* b, int ldb, long long stride_b,
         const T* beta, T* c, int ldc, long long stride_c, int count, bool tensor_float = false) {
    if (!valid(handle)) return kNotInitialized;
    if (!is_operation(op_a) || !is_operation(op_b)) return kInvalidValue;
    const int rows_a = op_a == kNo ? m : k, columns_a = op_a == kNo ? k : m;
    const int rows_b = op_b == kNo ? k : n, columns_b = op_b == kNo ? n : k;
    if (any_negative(m, n, k, count, stride_a, stride_b, stride_c) || lda < std::max(1, rows_a) ||
        ldb < std::max(1, rows_b) || ldc < std::max(1, m) || alpha == nullptr ||
        beta == nullptr || count > kMostMatrices)
        return kInvalidValue;
    const bool some = m > 0 && n > 0 && count > 0;
    if (some && count > 1 && stride_c < m) return kInvalidValue;  // results would overlap
    const T one = *alpha, two = *beta;  // read at the call, as from host memory
    return submit(handle, name, [=] {
        if (!some) return int(kSuccess);
        if (!in_memory(a, rows_a, columns_a, lda, stride_a, count) ||
            !in_memory(b, rows_b, columns_b, ldb, stride_b, count) ||
            !in_memory(c, m, n, ldc, stride_c, count))
            return int(kExecutionFailed);
        for (long long t = 0; t < count; ++t) {
            const S *A = a + t * stride_a, *B = b + t * stride_b;
            T* const C = c + t * stride_c;
            if constexpr (std::is_same_v<S, T>)
                if (!tensor_float) {
                    multiply(op_a, op_b, m, n, k, one, A, lda, B, ldb, two, C, ldc);
                    continue;
                }
            const auto left = as_read<T>(A, rows_a, columns_a, lda, tensor_float);
            const auto right = as_read<T>(B, rows_b, columns_b, ldb, tensor_float);
            multiply(op_a, op_b, m, n, k, one, left.data(), std::max(1, rows_a), right.data(),
                     std::max(1, rows_b), two, C, ldc);
        }
        return int(kSuccess);
    });
}

template <class T>
int gemv(void* handle, const char* name, int op, int m, int n, const T* alpha, const T* a, int lda,
         long long stride_a, const T* x, int incx, long long stride_x, const T* beta, T* y,
         int incy, long long stride_y, int count) {
    if (!valid(handle)) return kNotInitialized;
    if (!is_operation(op) || any_negative(m, n, count, stride_a, stride_x, stride_y) ||
        lda < std::max(1, m) || incx == 0 || incy == 0 || alpha == nullptr || beta == nullptr ||
        count > kMostMatrices)
        return kInvalidValue;
    const int length_x = op == kNo ? n : m, length_y = op == kNo ? m : n;
    if (count > 1 && stride_y % incy == 0 && stride_y / std::abs(incy) < length_y)
        return kInvalidValue;  // results would overlap
    const T one = *alpha, two = *beta;
    return submit(handle, name, [=] {
        if (m == 0 || n == 0 || count == 0) return int(kSuccess);
        if (!in_memory(a, m, n, lda, stride_a, count) ||
            !in_memory(x, 1, length_x, std::abs(incx), stride_x, count) ||
            !in_memory(y, 1, length_y, std::abs(incy), stride_y, count))
            return int(kExecutionFailed);
        std::vector<T> sums(length_y);
        for (long long t = 0; t < count; ++t) {
            const T *A = a + t * stride_a, *X = x + t * stride_x;
            T* const Y = y + t * stride_y;
            const auto at = [](int i, int length, int step) {
                return (long long)(step > 0 ? i : i - length + 1) * step;
            };
            std::fill(sums.begin(), sums.end(), T(0));
            for (int j = 0; j < n && one != T(0); ++j)
                for (int i = 0; i < m; ++i) {
                    const T value = A[i + (long long)j * lda];
                    sums[op == kNo ? i : j] += value * X[at(op == kNo ? j : i, length_x, incx)];
                }
            for (int i = 0; i < length_y; ++i) {
                T& out = Y[at(i, length_y, incy)];
                out = two == T(0) ? one * sums[i] : one * sums[i] + two * out;
            }
        }
        return int(kSuccess);
    });
}

// Solves op(A) x = b in place for one vector of n values with a step between them.
template <class T>
void solve(bool lower, bool transposed, bool unit, int n, const T* a, int lda, T* x, int step) {
    const bool forward = lower != transposed;
    for (int s = 0; s < n; ++s) {
        const int i = forward ? s : n - 1 - s;
        T sum = x[(long long)i * step];
        for (int r = 0; r < s; ++r) {
            const int j = forward ? r : n - 1 - r;
            sum -= (transposed ? a[j + (long long)i * lda] : a[i + (long long)j * lda]) *
                   x[(long long)j * step];
        }
        x[(long long)i * step] = unit ? sum : sum / a[i + (long long)i * lda];
    }
}

template <class T>
int trsm_batched(void* handle, const char* name, int side, int uplo, int op, int diag, int m,
                 int n, const T* alpha, const T* const* a, int lda, T* const* b, int ldb,
                 int count) {
    if (!valid(handle)) return kNotInitialized;
    const int order = side == kLeft ? m : n;
    if ((side | uplo | diag) & ~1 || !is_operation(op) || any_negative(m, n, count) ||
        lda < std::max(1, order) || ldb < std::max(1, m) || alpha == nullptr ||
        count > kMostMatrices)
        return kInvalidValue;
    const T factor = *alpha;
    return submit(handle, name, [=] {
        if (m == 0 || n == 0 || count == 0) return int(kSuccess);
        if (!in_memory(a, count, 1, count, 0, 1) || !in_memory(b, count, 1, count, 0, 1))
            return int(kExecutionFailed);
        for (int t = 0; t < count; ++t) {
            if (!in_memory(a[t], order, order, lda, 0, 1) || !in_memory(b[t], m, n, ldb, 0, 1))
                return int(kExecutionFailed);
            for (int j = 0; j < n; ++j)
                for (int i = 0; i < m; ++i) {
                    T& value = b[t][i + (long long)j * ldb];
                    value = factor == T(0) ? T(0) : factor * value;
                }
            if (factor == T(0)) continue;
            // X op(A) = B is op(A)^T X^T = B^T: the rows of B are the vectors.
            const bool left = side == kLeft, turned = (op != kNo) == left;
            for (int v = 0; v < (left ? n : m); ++v)
                solve(uplo == kLower, turned, diag == kUnit, order, a[t], lda,
                      left ? b[t] + (long long)v * ldb : b[t] + v, left ? 1 : ldb);
        }
        return int(kSuccess);
    });
}

// Cholesky factors in place; only the given triangle is touched.
template <class T>
int potrf_batched(int uplo, int n, T* const* a, int lda, int* info, int count) {
    if (uplo & ~1 || any_negative(n, count) || lda < std::max(1, n) || count > kMostMatrices)
        return 3;
    if (count == 0) return 0;
    if (!in_memory(a, count, 1, count, 0, 1) || !in_memory(info, count, 1, count, 0, 1)) return 6;
    for (int t = 0; t < count; ++t) {
        if (!in_memory(a[t], n, n, lda, 0, 1)) return 6;
        const auto at = [&](int i, int j) -> T& {  // of the lower factor
            return uplo == kLower ? a[t][i + (long long)j * lda] : a[t][j + (long long)i * lda];
        };
        info[t] = 0;
        for (int j = 0; j < n && info[t] == 0; ++j) {
            T pivot = at(j, j);
            for (int l = 0; l < j; ++l) pivot -= at(j, l) * at(j, l);
            if (pivot <= T(0)) {
                info[t] = j + 1;
                break;
            }
            at(j, j) = std::sqrt(pivot);
            for (int i = j + 1; i < n; ++i) {
                T sum = at(i, j);
                for (int l = 0; l < j; ++l) sum -= at(i, l) * at(j, l);
                at(i, j) = sum / at(j, j);
            }
        }
    }
    return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- For the stand-in --------------------------------------------------------------------------

EXPORT void* host_cublas_create() { return new Handle; }
EXPORT void host_cublas_hooks(Hook new_hook, Check new_check) {
    hook = new_hook;
    check = new_check;
}
EXPORT int host_cublas_replay(int id) { return std::size_t(id) < kept.size() ? kept[id]() : int(kInvalidValue); }
EXPORT void host_cublas_forget() { kept.clear(); }
EXPORT int host_spotrf_batched(int uplo, int n, float* const* a, int lda, int* info, int count) {
    return potrf_batched(uplo, n, a, lda, info, count);
}
EXPORT int host_dpotrf_batched(int uplo, int n, double* const* a, int lda, int* info, int count) {
    return potrf_batched(uplo, n, a, lda, info, count);
}

// ---- cuBLAS ------------------------------------------------------------------------------------

EXPORT int cublasSetStream_v2(void* handle, void* stream) {
    if (!valid(handle)) return kNotInitialized;
    auto* const h = static_cast<Handle*>(handle);
    h->stream = stream;
    h->workspace = nullptr;  // "unconditionally resets the workspace to the default one"
    h->workspace_bytes = 0;
    return kSuccess;
}
EXPORT int cublasSetWorkspace_v2(void* handle, void* workspace, std::size_t bytes) {
    if (!valid(handle)) return kNotInitialized;
    if (std::uintptr_t(workspace) % kWorkspaceAlignment != 0) return kInvalidValue;
    auto* const h = static_cast<Handle*>(handle);
    h->workspace = workspace;
    h->workspace_bytes = bytes;
    return kSuccess;
}
EXPORT int cublasGetStream_v2(void* handle, void** stream) {
    if (!valid(handle)) return kNotInitialized;
    *stream = static_cast<Handle*>(handle)->stream;
    return kSuccess;
}
EXPORT int cublasSetMathMode(void* handle, int mode) {
    if (!valid(handle)) return kNotInitialized;
    if (mode < 0 || (mode & ~16) > 3) return kInvalidValue;
    static_cast<Handle*>(handle)->math_mode = mode;
    return kSuccess;
}
EXPORT int cublasGetMathMode(void* handle, int* mode) {
    if (!valid(handle)) return kNotInitialized;
    *mode = static_cast<Handle*>(handle)->math_mode;
    return kSuccess;
}
EXPORT int cublasSetPointerMode_v2(void* handle, int mode) {
    if (!valid(handle)) return kNotInitialized;
    if (mode & ~1) return kInvalidValue;
    static_cast<Handle*>(handle)->pointer_mode = mode;
    return kSuccess;
}
EXPORT int cublasGetPointerMode_v2(void* handle, int* mode) {
    if (!valid(handle)) return kNotInitialized;
    *mode = static_cast<Handle*>(handle)->pointer_mode;
    return kSuccess;
}

// CUBLAS_TF32_TENSOR_OP_MATH
template <class T>
bool tensor_float(void* handle) {
    return valid(handle) && sizeof(T) == 4 && (static_cast<Handle*>(handle)->math_mode & ~16) == 3;
}

#define FUNCTIONS(L, T)                                                                            \
    EXPORT int cublas##L##gemm_v2(void* handle, int op_a, int op_b, int m, int n, int k,           \
                                  const T* alpha, const T* a, int lda, const T* b, int ldb,        \
                                  const T* beta, T* c, int ldc) {                                  \
        return gemm(handle, "gemm", op_a, op_b, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, c,     \
                    ldc, 0, 1);                                                                    \
    }                                                                                              \
    EXPORT int cublas##L##gemmStridedBatched(                                                      \
        void* handle, int op_a, int op_b, int m, int n, int k, const T* alpha, const T* a,         \
        int lda, long long stride_a, const T* b, int ldb, long long stride_b, const T* beta, T* c, \
        int ldc, long long stride_c, int count) {                                                  \
        return gemm(handle, "gemmStridedBatched", op_a, op_b, m, n, k, alpha, a, lda, stride_a, b, \
                    ldb, stride_b, beta, c, ldc, stride_c, count, tensor_float<T>(handle));        \
    }                                                                                              \
    EXPORT int cublas##L##gemvStridedBatched(                                                      \
        void* handle, int op, int m, int n, const T* alpha, const T* a, int lda,                   \
        long long stride_a, const T* x, int incx, long long stride_x, const T* beta, T* y,         \
        int incy, long long stride_y, int count) {                                                 \
        return gemv(handle, "gemvStridedBatched", op, m, n, alpha, a, lda, stride_a, x, incx,      \
                    stride_x, beta, y, incy, stride_y, count);                                     \
    }                                                                                              \
    EXPORT int cublas##L##trsmBatched(void* handle, int side, int uplo, int op, int diag, int m,   \
                                      int n, const T* alpha, const T* const* a, int lda,           \
                                      T* const* b, int ldb, int count) {                           \
        return trsm_batched(handle, "trsmBatched", side, uplo, op, diag, m, n, alpha, a, lda, b,   \
                            ldb, count);                                                           \
    }
FUNCTIONS(S, float)
FUNCTIONS(D, double)

EXPORT int cublasGemmStridedBatchedEx(void* handle, int op_a, int op_b, int m, int n, int k,
                                      const void* alpha, const void* a, int type_a, int lda,
                                      long long stride_a, const void* b, int type_b, int ldb,
                                      long long stride_b, const void* beta, void* c, int type_c,
                                      int ldc, long long stride_c, int count, int compute, int) {
    const auto call = [&](auto stored, auto value) {
        using S = decltype(stored);
        using T = decltype(value);
        return gemm(handle, "GemmStridedBatchedEx", op_a, op_b, m, n, k,
                    static_cast<const T*>(alpha), static_cast<const S*>(a), lda, stride_a,
                    static_cast<const S*>(b), ldb, stride_b, static_cast<const T*>(beta),
                    static_cast<T*>(c), ldc, stride_c, count, compute == 77);
    };
    if (type_a != type_b) return kNotSupported;
    if (type_a == 14 && type_c == 0 && compute == 68) return call(Bfloat16(), 0.0f);
    if (type_a != type_c) return kNotSupported;
    if (type_a == 0 && (compute == 68 || compute == 69 || compute == 77)) return call(0.0f, 0.0f);
    if (type_a == 1 && (compute == 70 || compute == 71)) return call(0.0, 0.0);
    return kNotSupported;
}
