//! From TOML text to checked values, each complaint with its line and column.

use std::ops::Range;

use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::error::{ConfigError, Place};
use super::schema;

/// What to do with the keys that containerd itself puts at the top of a runtime's options.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Extra {
    /// They are as unknown as any other.
    Refuse,
    /// They are containerd's and are left out.
    Containerd,
}

/// Parses and checks `text`; the result holds only known keys with values in range.
pub(super) fn parse(text: &str, origin: &str, extra: Extra) -> Result<Table, ConfigError> {
    let walk = Walk { text, origin, extra };
    let document = DeTable::parse(text).map_err(|error| ConfigError::Syntax {
        place: walk.place(error.span().unwrap_or(0..0)),
        message: error.message().to_owned(),
    })?;
    walk.table("", document.get_ref())
}

struct Walk<'a> {
    text: &'a str,
    origin: &'a str,
    extra: Extra,
}

impl Walk<'_> {
    fn table(&self, prefix: &str, table: &DeTable<'_>) -> Result<Table, ConfigError> {
        let mut entries: Vec<_> = table.iter().collect();
        // The first complaint is about what stands first, not about what sorts first.
        entries.sort_by_key(|(key, _)| key.span().start);
        let mut checked = Table::new();
        for (key, value) in entries {
            if prefix.is_empty() && self.extra == Extra::Containerd && is_containerds(key.get_ref()) {
                continue;
            }
            let name = match prefix {
                "" => key.get_ref().to_string(),
                _ => format!("{prefix}.{}", key.get_ref()),
            };
            checked.insert(key.get_ref().to_string(), self.entry(&name, key.span(), value)?);
        }
        Ok(checked)
    }

    fn entry(
        &self,
        name: &str,
        at: Range<usize>,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<Value, ConfigError> {
        if schema::is_section(name) {
            return match value.get_ref() {
                DeValue::Table(table) => Ok(Value::Table(self.table(name, table)?)),
                other => Err(ConfigError::WrongType {
                    place: self.place(value.span()),
                    key: name.into(),
                    expected: format!("a section, written `[{name}]`"),
                    found: kind_of(other).into(),
                }),
            };
        }
        let Some(key) = schema::find(name) else {
            return Err(ConfigError::UnknownKey {
                place: self.place(at),
                key: name.into(),
                advice: schema::advice(name),
            });
        };
        let place = self.place(value.span());
        // A number too large for TOML's own integers fails here.
        let plain =
            Value::deserialize(toml::de::ValueDeserializer::from(value.clone())).map_err(|error| {
                ConfigError::BadValue {
                    place: place.clone(),
                    key: name.into(),
                    value: self.text.get(value.span()).unwrap_or_default().to_owned(),
                    expected: format!("{} ({})", key.expected(), error.message()),
                }
            })?;
        key.check(&plain, &place).map(|()| plain)
    }

    /// The line and column of the first byte of `span`, both from 1.
    fn place(&self, span: Range<usize>) -> Place {
        let before = self.text.get(..span.start.min(self.text.len())).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Place { origin: self.origin.to_owned(), position: Some((line, column)) }
    }
}

/// Whether the key is a field of `runtimeoptions.v1.Options`: containerd marshals the whole options table, its own
/// fields included, and matches their names without regard to case.
fn is_containerds(key: &str) -> bool {
    ["TypeUrl", "ConfigPath", "ConfigBody"].iter().any(|field| field.eq_ignore_ascii_case(key))
}

fn kind_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    }
}
