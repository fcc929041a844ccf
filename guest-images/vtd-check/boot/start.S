// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The way from the loader's 32-bit protected mode to C in long mode.
//
// PVH and multiboot-1 agree on what matters here: flat 32-bit segments, paging and interrupts off,
// and in EBX the physical address of a start-info structure. EAX tells them apart.

        .equ    CR0_PE, 1 << 0
        .equ    CR0_PG, 1 << 31
        .equ    CR4_PAE, 1 << 5
        .equ    MSR_EFER, 0xc0000080
        .equ    EFER_LME, 1 << 8
        .equ    XEN_ELFNOTE_PHYS32_ENTRY, 18

        .section .note.pvh, "a"
        .balign 4
        .long   4                       // name size
        .long   4                       // descriptor size
        .long   XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   start32

        .text
        .code32
        .global start32
start32:
        cli
        cld
        movl    $stack_top, %esp
        movl    %eax, %edi              // first argument of guest_main: the loader's magic
        movl    %ebx, %esi              // second: its start-info structure

        movl    $CR4_PAE, %eax
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $MSR_EFER, %ecx
        rdmsr
        orl     $EFER_LME, %eax
        wrmsr
        movl    $(CR0_PG | CR0_PE), %eax
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $CODE64, $start64

        .code64
start64:
        movl    $DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        xorl    %eax, %eax
        movl    %eax, %fs
        movl    %eax, %gs
        movl    %edi, %edi              // the upper halves are undefined on leaving 32-bit mode
        movl    %esi, %esi
        movl    $stack_top, %esp
        xorl    %ebp, %ebp
        call    guest_main
1:      hlt
        jmp     1b

        .section .rodata
        .balign 8
gdt:
        .quad   0
        .quad   0x00af9b000000ffff      // 64-bit code, ring 0
        .quad   0x00cf93000000ffff      // data, ring 0
gdt_end:
        .equ    CODE64, 0x08
        .equ    DATA, 0x10
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt

// The first 4 GiB mapped to themselves in 2 MiB pages, written out by the assembler: code that
// filled these tables would be slow where ring 0 is emulated. Device space is uncached.
        .equ    PRESENT, 1 << 0
        .equ    WRITABLE, 1 << 1
        .equ    UNCACHED, 1 << 4
        .equ    LARGE, 1 << 7
        .equ    DEVICE_SPACE, 0xb0000000

        .data
        .balign 4096
pml4:
        .quad   pdpt + (PRESENT | WRITABLE)
        .fill   511, 8, 0
pdpt:
        .quad   page_directories + 0x0000 + (PRESENT | WRITABLE)
        .quad   page_directories + 0x1000 + (PRESENT | WRITABLE)
        .quad   page_directories + 0x2000 + (PRESENT | WRITABLE)
        .quad   page_directories + 0x3000 + (PRESENT | WRITABLE)
        .fill   508, 8, 0
page_directories:
        .set    address, 0
        .rept   2048
        .if     address >= DEVICE_SPACE
        .quad   address + (PRESENT | WRITABLE | UNCACHED | LARGE)
        .else
        .quad   address + (PRESENT | WRITABLE | LARGE)
        .endif
        .set    address, address + 0x200000
        .endr

        .bss
        .balign 16
        .skip   16384
stack_top:
