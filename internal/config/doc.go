// Package config is what a daemon and its images are told: one tree of structs for
// erofsd's own TOML, nydus's configuration files (v1 JSON, v2 JSON and TOML) and the
// blob entries of nydusd's API.
//
// Every form becomes a tree of nodes that know their place (json.go, toml.go), which
// decode.go puts into structs by their tags; what is wrong is collected and told all at
// once, each with its place. The package opens no file but the configuration and the
// files of secrets that it names, makes no connection and knows no other part of the
// product. Read [Config] and [Backend] first, then load.go (own form), compat_nydus.go
// and compat_entry.go (nydus's). It has no state and no lock.
package config
