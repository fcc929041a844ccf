// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// Interrupt entry points: vectors 0 to 31 are exceptions, 32 to 47 interrupts. Each stub pushes its
// vector (and a zero where the CPU pushes no error code) and joins the common path, which hands
// `struct trap_frame *` to C.

        .equ    VECTORS, 48
        .equ    STUB_SIZE, 16
        .equ    ERROR_CODE_VECTORS, 0x60227d00 // 8, 10-14, 17, 21, 29, 30

        .text
        .code64
        .global vector_stubs
        .balign STUB_SIZE
vector_stubs:
        .set    vector, 0
        .rept   VECTORS
        .balign STUB_SIZE
        .if     ((ERROR_CODE_VECTORS >> vector) & 1) == 0
        pushq   $0
        .endif
        pushq   $vector
        jmp     trap_common
        .set    vector, vector + 1
        .endr

trap_common:
        pushq   %rax
        pushq   %rcx
        pushq   %rdx
        pushq   %rsi
        pushq   %rdi
        pushq   %r8
        pushq   %r9
        pushq   %r10
        pushq   %r11
        movq    %rsp, %rdi
        cld
        call    trap_handler
        popq    %r11
        popq    %r10
        popq    %r9
        popq    %r8
        popq    %rdi
        popq    %rsi
        popq    %rdx
        popq    %rcx
        popq    %rax
        addq    $16, %rsp
        iretq
