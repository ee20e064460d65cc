//go:build race

package smoke

// raced says that memory is the race detector's, which gives none back.
const raced = true
