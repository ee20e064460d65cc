// Package lint holds the rules of the repository as Go tests: who may import whom
// (docs/design.md 1.3), go vet, staticcheck, gofumpt, and the size of files. It
// has no code besides.
package lint
