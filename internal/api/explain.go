package api

import (
	"context"
	"net/http"
	"net/url"
)

// An Explanation says whether an image is served lazily, and why. The snapshotter gives it,
// at its system socket: GET /explain?image=REFERENCE → []Explanation.
type Explanation struct {
	Reference  string  `json:"reference,omitempty"` // it was pulled by; "": not known
	Name       string  `json:"name"`                // of its uppermost snapshot
	Lazy       bool    `json:"lazy"`
	State      string  `json:"state"` // mounted, idle, failed or unpacked
	Why        string  `json:"why"`
	Mountpoint string  `json:"mountpoint,omitempty"`
	ID         string  `json:"id,omitempty"` // the daemon's
	Layers     []Layer `json:"layers"`       // the uppermost first
}

// A Layer is a snapshot of an image.
type Layer struct {
	Snapshot string            `json:"snapshot"` // its number
	ChainID  string            `json:"chain_id,omitempty"`
	Decision string            `json:"decision"` // remote, bootstrap or unpacked
	Why      string            `json:"why"`
	Labels   map[string]string `json:"labels,omitempty"` // that it was decided by
}

// Explain asks a snapshotter about the images that were pulled by a reference; "": all.
func (c *Client) Explain(ctx context.Context, reference string) (list []Explanation, err error) {
	return list, c.call(ctx, http.MethodGet, "/explain?image="+url.QueryEscape(reference), nil, &list)
}
