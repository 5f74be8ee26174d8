// Fibers of the host: a stack each, and a jump from one to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(HOST_CUDA_UCONTEXT)
#define HOST_CUDA_UCONTEXT
#endif
#if defined(HOST_CUDA_UCONTEXT)
#include <ucontext.h>
#endif

namespace host_cuda {

constexpr std::size_t kStackBytes = 128 * 1024;

#if !defined(HOST_CUDA_UCONTEXT)
// swapcontext would change the signal mask: a system call for every switch. And no `ret`: it would be
// predicted to return to where the last call was, wrongly every time.
extern "C" void host_cuda_switch(void** save, void* load);
asm(R"(
.text
.weak host_cuda_switch
.type host_cuda_switch, @function
host_cuda_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    popq %rcx; jmpq *%rcx
.size host_cuda_switch, . - host_cuda_switch
)");

struct Context {
    void* stack_pointer = nullptr;

    void prepare(char* stack, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + kStackBytes);
        *--top = nullptr;  // the return address of `entry`, which never returns
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        stack_pointer = top;
    }
    static void jump(Context& from, Context& to) {
        host_cuda_switch(&from.stack_pointer, to.stack_pointer);
    }
};
#else
struct Context {
    ucontext_t context;

    void prepare(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void jump(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

}  // namespace host_cuda
