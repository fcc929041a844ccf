// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The loader's device tree (Devicetree Specification, chapter 5), as far as needed.
#pragma once
#include "lib/types.h"

// False if there is none.
bool devicetree_init(u64 address);

// A property of the first node that is compatible with `compatible`, or has the name `node`; null
// if there is none. `length` in bytes.
const void *property_of_compatible(const char *compatible, const char *name, u32 *length);
const void *property_of_node(const char *node, const char *name, u32 *length);

// A property of the first node that has it.
const void *property_anywhere(const char *name, u32 *length);

// Whether this is one of the words of the command line (`bootargs`).
bool on_command_line(const char *word);

// The address in the first pair of a node's `reg`, for nodes of the root with two cells each; 0 if
// there is none.
u64 address_of(const char *compatible);

// Cell number `index` of a property.
u32 cell(const void *property, unsigned index);
