//go:build race

package blobmgr

const defaultHistories = 10000
