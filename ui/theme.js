// Before anything is painted: the colours that were chosen here before, if any.
document.documentElement.dataset.theme = localStorage.getItem('pd-theme') ?? 'auto';
