// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The attribute `bitfield` of the package `bitfield-struct`, for types that others see.
//!
//! For a field `x`, `bitfield-struct` (0.13) generates `x`, `with_x`, `set_x`, `with_x_checked` and
//! `set_x_checked`, all with the field's attributes: its documentation has two more methods per
//! field than a reader looks for, and no option leaves them out. Here they exist, but documentation
//! does not show them. A package that uses this one also depends on `bitfield-struct`.
#![deny(missing_docs)]

use proc_macro::{Delimiter, Group, TokenStream, TokenTree};

/// As `bitfield_struct::bitfield`, without the documentation of methods named `*_checked`.
#[proc_macro_attribute]
pub fn bitfield(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let mut all = attribute("::bitfield_struct::bitfield", arguments);
    all.extend(item.into_iter().map(|token| match token {
        TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
            TokenTree::Group(Group::new(Delimiter::Brace, marked(group.stream())))
        }
        other => other,
    }));
    all
}

/// `fields`, each with the attribute that its methods get.
fn marked(fields: TokenStream) -> TokenStream {
    let mut marked = TokenStream::new();
    let mut first = true;
    for token in fields {
        if first {
            marked.extend(attribute("::twostage_bits::hide_checked", TokenStream::new()));
        }
        first = matches!(&token, TokenTree::Punct(punct) if punct.as_char() == ',');
        marked.extend([token]);
    }
    marked
}

/// Hides a method named `*_checked` from documentation. For what [`macro@bitfield`] generates.
#[doc(hidden)]
#[proc_macro_attribute]
pub fn hide_checked(_: TokenStream, method: TokenStream) -> TokenStream {
    let mut tokens = method.clone().into_iter();
    let name = tokens.find(|it| it.to_string() == "fn").and_then(|_| tokens.next());
    if !name.is_some_and(|name| name.to_string().ends_with("_checked")) {
        return method;
    }
    let hidden = TokenTree::Ident(proc_macro::Ident::new("hidden", proc_macro::Span::call_site()));
    let mut all = attribute("doc", hidden.into());
    all.extend(method);
    all
}

/// `#[path(arguments)]`.
fn attribute(path: &str, arguments: TokenStream) -> TokenStream {
    // A path is Rust's in every edition.
    let mut inner: TokenStream = path.parse().unwrap_or_default();
    inner.extend([TokenTree::Group(Group::new(Delimiter::Parenthesis, arguments))]);
    let mut all: TokenStream = "#".parse().unwrap_or_default();
    all.extend([TokenTree::Group(Group::new(Delimiter::Bracket, inner))]);
    all
}
